import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization.networks import small_resnet

from largebatch.base.errors import UserError
from largebatch.quantization.calibrate import BINS, Histogram, observe, ranges
from largebatch.quantization.network import IMAGES
from largebatch.quantization.trace import trace

values = st.lists(st.floats(-1e6, 1e6, width=32).map(lambda x: round(x, 3)), min_size=1, max_size=30)


def histogram_of(*batches):
    histogram = Histogram()
    for batch in batches:
        histogram.add(torch.as_tensor(batch, dtype=torch.float32))
    return histogram


@given(st.lists(values, min_size=2, max_size=5))
def test_the_order_and_the_cuts_of_batches_do_not_matter(batches):
    together = histogram_of(list(itertools.chain(*batches)))
    for order in (batches, batches[::-1]):
        apart = histogram_of(*order)
        assert (apart.low, apart.high, apart.zeros) == (together.low, together.high, together.zeros)
        assert all(a.equal(b) for a, b in zip(apart.bins(), together.bins(), strict=True))


@given(st.lists(values, min_size=1, max_size=3))
def test_every_value_is_in_its_bin(batches):
    histogram = histogram_of(*batches)
    everything = torch.tensor(list(itertools.chain(*batches)), dtype=torch.float32).double()
    middles, counts = histogram.bins()
    assert histogram.count == len(everything)
    others = everything[everything != 0].sort().values
    width = (histogram.high - histogram.low) / BINS * 2 + 1e-30
    assert ((middles.repeat_interleave(counts) - others).abs() <= width).all()


def test_values_may_grow_beyond_all_measure():
    histogram = histogram_of([1e-30, -1e-30], [3e38, 1.0])
    assert (histogram.low, histogram.high) == pytest.approx((-1e-30, 3e38))
    middles, counts = histogram.bins()
    assert counts.tolist() == [1, 2, 1]  # the small ones on either side of 0
    assert middles[1] < 3e38 / BINS * 2


def test_many_values_take_no_more_memory():
    histogram = Histogram()
    for power in range(-30, 30):
        histogram.add(torch.randn(300_000) * 2.0**power)
    assert len(histogram.bins()[0]) <= BINS
    assert histogram.count <= 60 * 2**16


def test_the_extremes_of_a_large_tensor_are_exact():
    large = torch.rand(64, 56, 56, 3).permute(0, 3, 1, 2)
    large[3, 1, 7, 7] = 9.0
    assert ranges({"x": histogram_of(large)}, "minmax") == {"x": (0.0, 9.0)}


def bell_with_an_outlier():
    bell = torch.randn(60_000, generator=torch.Generator().manual_seed(0))
    bell[0] = 40.0
    return histogram_of(bell)


def test_three_calibrations():
    found = {how: ranges({"x": bell_with_an_outlier()}, how)["x"] for how in ("minmax", "percentile", "mse")}
    assert found["minmax"][1] == 40
    assert 3.5 < found["percentile"][1] < 4.6  # 0.01 % of a normal distribution lie above 3.72
    assert -4.6 < found["percentile"][0] < -3.5
    # Cut off at 20 the outlier would cost 20² = 400, and the other 60,000 gain s² / 12 · 60,000 < 150 of it in 8 bits,
    # but in 4 bits 256 times as much: the fewer the integers, the more they are worth in the middle.
    assert found["mse"][1] > 30
    assert 2 < ranges({"x": bell_with_an_outlier()}, "mse", bits=4)["x"][1] < 10


def test_a_tensor_of_zeros_has_a_range():
    for how in ("minmax", "percentile", "mse"):
        assert ranges({"x": histogram_of([0.0] * 9)}, how) == {"x": (0.0, 0.0)}


def test_share_and_picture():
    histogram = histogram_of([0.0, 0.0, 1.0, 2.0, 3.0, 8.0])
    assert histogram.outside(0.0, 3.5) == pytest.approx(1 / 6)
    assert histogram.outside(0.0, 8.0) == 0
    assert histogram.picture(8) == " ███   █"
    assert histogram_of([0.0]).picture(4) == "    "


@pytest.fixture(scope="module")
def network():
    return trace(small_resnet(), (3, 16, 16))


def test_ranges_of_a_network(network):
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = observe(network, images.split(4), [IMAGES, "relu", "fc"])
    assert {*found} == {IMAGES, "relu", "fc"}
    assert found["relu"].low == 0 < found["relu"].high
    assert found[IMAGES].high == float(images.max())
    again = observe(network, images.split(2), ["fc"])["fc"]
    assert again.count == found["fc"].count == 60


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([], "there are no calibration images"),
        ([torch.zeros(2, 3, 8, 16)], "have the shape 3×8×16, and the network takes 3×16×16"),
        ([torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), torch.nan)], "calibration image 2 has NaN"),
        ([torch.full((1, 3, 16, 16), 3e38)], "makes conv1 infinite or NaN"),
    ],
)
def test_images_that_calibrate_nothing(network, images, words):
    with pytest.raises(UserError, match=words):
        observe(network, images, ["conv1"])
