import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.base.errors import UserError
from largebatch.quantization.affine import dequantize, integer_range, quantize, scale_and_zero_point

# The functions of PyTorch that ours are compared with are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*are deprecated")

ordinary = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
ranges = st.tuples(ordinary, ordinary).map(sorted)
kinds = st.tuples(st.integers(2, 8), st.booleans(), st.booleans())  # bits, signed, symmetric


def parameters(low, high, bits=8, signed=False, symmetric=False):
    return scale_and_zero_point(torch.tensor(low), torch.tensor(high), bits, signed, symmetric)


def inside(low, high, count=257):
    """Numbers of a range that holds 0, in float64: its ends, 0, and what lies between."""
    between = torch.linspace(0, 1, count, dtype=torch.float64)
    return torch.cat([min(low, 0) * between, max(high, 0) * between]).sort().values


@given(ranges, kinds)
def test_inside_the_range_the_error_is_half_a_unit(ends, kind):
    scale, zero = parameters(*ends, *kind)
    values = inside(*ends)
    restored = dequantize(quantize(values, scale, zero, *kind[:2]), scale.double(), zero)
    # The scale is rounded to float32, which moves the ends of the range by 2^-24 of it.
    assert ((restored - values).abs() <= scale.double() * (0.5 + 1e-4)).all()


@given(ranges, kinds)
def test_zero_is_exact_and_the_zero_point_an_integer_of_the_range(ends, kind):
    scale, zero = parameters(*ends, *kind)
    least, greatest = integer_range(*kind[:2])
    assert least <= int(zero) <= greatest
    assert quantize(torch.zeros(1), scale, zero, *kind[:2]) == zero
    assert scale > 0


@given(ranges, kinds)
def test_integers_keep_their_order_and_come_back_as_themselves(ends, kind):
    scale, zero = parameters(*ends, *kind)
    integers = quantize(inside(*ends), scale, zero, *kind[:2])
    assert (integers.int().diff() >= 0).all()
    again = quantize(dequantize(integers, scale, zero), scale, zero, *kind[:2])
    assert again.equal(integers)


def test_the_formulas_by_hand():
    # [-1, 3] to 0 … 255: s = 4 / 255, z = round(1 · 255 / 4) = round(63.75)
    scale, zero = parameters(-1.0, 3.0)
    assert float(scale) == pytest.approx(4 / 255, rel=1e-7)
    assert int(zero) == 64
    # symmetric and signed: s = 3 / 127 to either side of 0
    scale, zero = parameters(-1.0, 3.0, signed=True, symmetric=True)
    assert float(scale) == pytest.approx(3 / 127, rel=1e-7)
    assert int(zero) == 0
    assert quantize(torch.tensor([-3.0, 3.0, -9.0]), scale, zero, signed=True).tolist() == [-127, 127, -128]
    # 2 bits, a range that does not hold 0: widened to [0, 6], s = 2
    scale, zero = parameters(3.0, 6.0, bits=2)
    assert (float(scale), int(zero)) == (2, 0)
    assert quantize(torch.tensor([0.0, 1.0, 3.0, 5.0, 6.0]), scale, zero, bits=2).tolist() == [0, 0, 2, 2, 3]


@pytest.mark.parametrize(("signed", "symmetric", "expected"), [(0, 0, 0), (1, 0, 0), (0, 1, 128), (1, 1, 0)])
def test_a_range_of_zero_alone(signed, symmetric, expected):
    scale, zero = parameters(0.0, 0.0, 8, bool(signed), bool(symmetric))
    assert (float(scale), int(zero)) == (1, expected)


@settings(deadline=None)
@given(st.floats(2.0**-20, 2.0**20, width=32), st.integers(0, 255), st.integers(0, 2**32))
def test_as_pytorch_does_but_for_ties(scale, zero, seed):
    values = torch.randn(512, generator=torch.Generator().manual_seed(seed)) * scale * 100
    ours = quantize(values, torch.tensor(scale), torch.tensor(zero)).int()
    theirs = torch.quantize_per_tensor(values, scale, zero, torch.quint8).int_repr().int()
    exact = values.double() / scale
    near_tie = ((exact - exact.floor()) - 0.5).abs() < 1e-4
    assert ours[~near_tie].equal(theirs[~near_tie])
    assert (ours - theirs).abs().max() <= 1


def test_per_channel_as_pytorch_does():
    values = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    scale, zero = scale_and_zero_point(values.amin((0, 2)), values.amax((0, 2)))
    ours = quantize(values, scale, zero, axis=1)
    theirs = torch.quantize_per_channel(values, scale.double(), zero, 1, torch.quint8)
    assert ours.equal(theirs.int_repr())
    assert dequantize(ours, scale, zero, axis=1).allclose(theirs.dequantize(), rtol=1e-6)


def test_at_a_tie_the_place_of_an_odd_zero_point_decides():
    ties, one = torch.tensor([0.5, 1.5, 2.5]), torch.tensor(1.0)
    assert quantize(ties, one, torch.tensor(1)).tolist() == [2, 2, 4]  # round(x + 1)
    assert torch.quantize_per_tensor(ties, 1.0, 1, torch.quint8).int_repr().tolist() == [1, 3, 3]  # round(x) + 1
    even = torch.quantize_per_tensor(ties, 1.0, 2, torch.quint8).int_repr()
    assert quantize(ties, one, torch.tensor(2)).equal(even)


@pytest.mark.parametrize("bits", [1, 9, 0, -3])
def test_bits_out_of_reach(bits):
    with pytest.raises(UserError, match=f"bits={bits} is not possible: integers have 2 to 8 bits"):
        integer_range(bits, signed=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(UserError, match="not finite"):
        parameters(-1.0, bad)
    with pytest.raises(UserError, match="not finite"):
        quantize(torch.tensor([0.0, bad]), torch.tensor(1.0), torch.tensor(0))


def test_a_range_that_ends_before_it_begins():
    with pytest.raises(UserError, match="from 2 to 1 ends before"):
        parameters(2.0, 1.0)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none(bad):
    scales, zeros = torch.tensor([1.0, bad]), torch.tensor([0, 0])
    for function in (quantize, dequantize):
        with pytest.raises(UserError, match=f"a scale of {bad:g} is not allowed: it must be a finite number above 0"):
            function(torch.zeros(2, 3, dtype=torch.uint8), scales, zeros, axis=0)


@pytest.mark.parametrize("bad", [-1, 256, 2**31, 0.5])
def test_a_zero_point_outside_of_the_integers(bad):
    with pytest.raises(UserError, match=r"zero points from .* are not integers from 0 to 255"):
        quantize(torch.zeros(3), torch.tensor(1.0), torch.tensor(bad))


def test_far_beyond_the_range():
    # 2^31 · 4 units and more, where int32 would wrap around: the ends of the range.
    far = torch.tensor([2.0**33, -(2.0**33), 3e38, -3e38])
    assert quantize(far, torch.tensor(1.0), torch.tensor(7)).tolist() == [255, 0, 255, 0]
    assert quantize(far, torch.tensor(1e-30), torch.tensor(0), signed=True).tolist() == [127, -128, 127, -128]
    for value in (2**31, -(2**40)):  # as int32: −2^31, and 0
        with pytest.raises(UserError, match=f"integers from {value} to {value} are too large"):
            dequantize(torch.tensor([value]), torch.tensor(1.0), torch.tensor(0))
    assert dequantize(torch.tensor([2**30]), torch.tensor(0.5), torch.tensor(-128)).tolist() == [2.0**29 + 64]


def test_a_range_wider_than_float32():
    for low, high in ((-3e38, 3e38), (0.0, 1e300), (-1e308, 1e308)):
        with pytest.raises(UserError, match=r"is too wide: float32 ends at 3\.4e38"):
            scale_and_zero_point(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64))
