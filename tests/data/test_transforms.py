import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from largebatch.data.transforms import Crops, crop_and_flip, draw_crops, draw_resized_crop, normalise


def test_crop_and_flip_equals_slicing():
    images = torch.arange(3 * 2 * 4 * 5, dtype=torch.uint8).view(3, 2, 4, 5)
    crops = Crops(torch.tensor([0, 2, 1]), torch.tensor([1, 0, 2]), torch.tensor([0, 1, 1]))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    expected = torch.stack([padded[0, :, 0:4, 1:6], padded[1, :, 2:6, 0:5].flip(-1), padded[2, :, 1:5, 2:7].flip(-1)])
    assert crop_and_flip(images, crops, pad=1).equal(expected)


def test_without_padding_images_stay_whole():
    images = torch.randint(0, 256, (8, 1, 6, 6), dtype=torch.uint8)
    crops = draw_crops(0, 0, torch.arange(8), pad=0, flip=False)
    assert crop_and_flip(images, crops, pad=0).equal(images)


@given(st.permutations(range(12)), st.integers(1, 12), st.integers(0, 9), st.integers(0, 9))
def test_chunks_and_order_do_not_change_a_samples_crop(order, chunk, seed, epoch):
    indices = torch.tensor(order)
    whole = draw_crops(seed, epoch, torch.arange(12), pad=4, flip=True)
    for part in indices.split(chunk):
        crops = draw_crops(seed, epoch, part, pad=4, flip=True)
        for name in ("top", "left", "flip"):
            assert getattr(crops, name).equal(getattr(whole, name)[part])


def test_windows_are_uniform_and_half_are_mirrored():
    crops = draw_crops(3, 1, torch.arange(25000), pad=2, flip=True)
    windows = torch.bincount(crops.top * 5 + crops.left, minlength=25)
    assert (windows - 1000).abs().max() < 5 * 1000**0.5
    assert abs(crops.flip.sum().item() - 12500) < 5 * (25000 * 0.25) ** 0.5
    assert not draw_crops(3, 1, torch.arange(100), pad=2, flip=False).flip.any()


def test_epochs_and_seeds_draw_other_crops():
    tops = {tuple(draw_crops(s, e, torch.arange(20), 4, True).top.tolist()) for s in range(3) for e in range(3)}
    assert len(tops) == 9


def test_normalise_is_per_channel():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    images = normalise(pixels, (0.5, 0.25), (0.5, 0.125), torch.float64)
    assert images.flatten().tolist() == pytest.approx([-1.0, 6.0], rel=1e-14)
    assert images.dtype == torch.float64


@pytest.mark.parametrize(("width", "height"), [(500, 375), (200, 900), (64, 48)])
def test_resized_crops_have_torchvisions_distribution(width, height):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(4000)])
    ours = np.array([draw_resized_crop(0, 0, index, width, height, True)[0] for index in range(4000)])
    for figure in (
        lambda box: box[:, 2] * box[:, 3] / (width * height),
        lambda box: np.log(box[:, 3] / box[:, 2]),
        lambda box: box[:, 0] / height,
        lambda box: box[:, 1] / width,
    ):
        a, b = np.sort(figure(theirs)), np.sort(figure(ours))
        grid = np.union1d(a, b)
        gap = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / 4000
        assert gap < 0.05  # Kolmogorov-Smirnov of two samples of 4000: above 0.05 is beyond 1 in 10,000


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 10**6))
def test_a_resized_crop_lies_within_the_image(width, height, index):
    (top, left, h, w), _ = draw_resized_crop(1, 2, index, width, height, True)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0
    assert w > 0


def test_an_image_that_is_all_length_is_cut_to_the_nearest_ratio():
    boxes = {draw_resized_crop(0, 0, index, 2000, 10, False) for index in range(50)}
    assert ((0, 993, 10, 13), False) in boxes  # the largest central crop of 4:3


def test_half_of_the_resized_crops_are_mirrored():
    mirrored = sum(draw_resized_crop(0, 0, index, 100, 100, True)[1] for index in range(4000))
    assert abs(mirrored - 2000) < 5 * 1000**0.5
    assert not any(draw_resized_crop(0, 0, index, 100, 100, False)[1] for index in range(100))
