"""Trained networks as modules: loaded, offloaded, in integers."""

import pytest
import torch
from torch import nn

import largebatch


@pytest.fixture(scope="module")
def run(digits_runs) -> largebatch.Run:
    return largebatch.Run(digits_runs / "seed0")


def error(model, images, labels):
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) != labels).double().mean())


def test_a_loaded_network_makes_the_errors_that_the_run_recorded(run):
    model, (images, labels) = largebatch.load_model(run), largebatch.load_images(run)
    assert not model.training
    assert images.shape == (360, 1, 8, 8)
    assert error(model, images, labels) == pytest.approx(run.epochs(frame=False)[-1]["val_error"])
    folded = largebatch.load_model(str(run.directory), fold_bn=True)
    assert torch.allclose(folded(images), model(images), atol=1e-4)


def test_training_images_have_no_augmentation(run):
    images, labels = largebatch.load_images(run, "training", 300)
    assert images.shape == (300, 1, 8, 8)
    assert labels.shape == (300,)
    assert images.equal(largebatch.load_images(run, "training", 300)[0])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("test",), "split=test is not known: it takes validation, training"),
        (("validation", 361), "count=361 is more than the 360 validation images"),
        (("validation", 0), "count=0 is too small"),
    ],
)
def test_a_mistake_about_images_is_one_sentence(run, arguments, sentence):
    with pytest.raises(largebatch.UserError, match=sentence):
        largebatch.load_images(run, *arguments)


def test_weights_that_are_not_there_are_named(run):
    with pytest.raises(largebatch.UserError, match="weights=nowhere is not a file"):
        largebatch.load_model(run, weights="nowhere")


def test_a_budget_may_be_a_size_in_words(run):
    model, (images, _) = largebatch.load_model(run), largebatch.load_images(run, count=8)
    expected = model(images)
    with largebatch.offload(model, "cpu", budget="310kB") as statistics:
        assert model(images).equal(expected)
    assert 0 < statistics.peak_bytes <= 310_000
    for budget, sentence in (("lots", "budget=lots is not a size"), ("1kB", "budget=1,000 bytes is too small")):
        with pytest.raises(largebatch.UserError, match=sentence), largebatch.offload(model, "cpu", budget=budget):
            pass


def test_a_quantized_network_is_a_module_with_a_report(run):
    model, validation = largebatch.load_model(run), largebatch.load_images(run)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, _ = largebatch.load_images(run, "training", 128)
    small = largebatch.quantize(model, images, validation=validation, report=True)
    assert isinstance(small, nn.Module)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    report = small.report
    assert report["error_before"] == pytest.approx(error(model, *validation))
    assert report["error_after"] == pytest.approx(error(small, *validation))
    assert report["size_ratio"] < 0.5
    assert report["recipe"]["images"] == 128
    assert report["decibels"] > 20
    assert "top-1 drop" in str(report)
    assert "written to" not in str(report)
    assert any(tensor.dtype == torch.int8 for tensor in small.state_dict().values())


def test_batches_do_as_well_as_one_tensor(run):
    model, (images, _) = largebatch.load_model(run), largebatch.load_images(run, "training", 128)
    options = {"engine": "reference", "reduce_range": False}
    one = largebatch.quantize(model, images, **options)
    other = largebatch.quantize(model, iter(images.split(64)), **options)
    assert one(images).equal(other(images))
    assert one.report is None


def test_layers_can_stay_in_floats(run):
    model, (images, _) = largebatch.load_model(run), largebatch.load_images(run, "training", 64)
    small = largebatch.quantize(model, images, keep=["fc"], engine="reference")
    assert "fc" not in small.quantized.layers
    with pytest.raises(largebatch.UserError, match="keep names 'head', which is no layer: these are "):
        largebatch.quantize(model, images, keep=["head"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 9}, "bits=9 is not possible"),
        ({"calibration": "guess"}, "calibration=guess is not known"),
        ({"images": torch.zeros(8, 8)}, r"of shape \(images, C, H, W\)"),
        ({"images": []}, "one at least"),
        ({"model": nn.Linear(1, 1)}, "is in training mode: call model.eval"),
    ],
)
def test_a_mistake_about_integers_is_one_sentence(run, options, sentence):
    given = {"model": largebatch.load_model(run), "images": torch.zeros(2, 1, 8, 8), **options}
    with pytest.raises(largebatch.UserError, match=sentence):
        largebatch.quantize(**given)
