"""Every operator that is written to ONNX, over random geometries, against the oracle."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantization.examples import SIGNED, heavy

from largebatch.quantization.engines import x86
from largebatch.quantization.engines.onnxruntime import OnnxRuntime
from largebatch.quantization.network import IMAGES, Network, Node, Quantization
from largebatch.quantization.reference import Reference

CHANNELS = 4
FLAT = {"target": "aten.flatten.using_ints", "arguments": [{"input": 0}, 1]}
# Scales of which no ratio is simple: a tie is where one unit of difference is right.
IN, OUT = Quantization(0.0217, 117), Quantization(0.0173, 101)
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
pairs = st.tuples(st.integers(1, 4), st.integers(1, 4)).map(list)
sizes = st.tuples(st.integers(5, 13), st.integers(5, 13))


@st.composite
def windows(draw):
    """Kernel, stride and padding of at most half the kernel, as pools take them."""
    kernel, stride = draw(pairs), draw(pairs)
    padding = [draw(st.integers(0, size // 2)) for size in kernel]
    return {"kernel": kernel, "stride": stride, "padding": padding, "ceil": draw(st.booleans())}


def compare(size, *nodes, engines=("onnxruntime",)):
    """Hold what makes the last node's integers against the oracle: one unit, at ties alone."""
    last = nodes[-1]
    ending = (Node("flat", "move", (last.name,), last.output, FLAT), Node("end", "dequantize", ("flat",)))
    if last.output is None:
        ending = (Node("end", "float", (last.name,), None, FLAT),)
    network = Network((Node("in", "quantize", (IMAGES,), IN), *nodes, *ending), (CHANNELS, *size))
    images = torch.randn(2, CHANNELS, *size, generator=torch.Generator().manual_seed(0))
    expected = Reference().load(network)(images)
    unit = 1e-4 if last.output is None else last.output.scale * 1.001
    programs = {"onnxruntime": lambda: OnnxRuntime().load(network), "x86": lambda: x86.load_unchecked(network)}
    for name in engines:
        difference = (programs[name]()(images) - expected).abs()
        assert difference.max() <= unit, (name, nodes)
        assert (difference > unit / 2).double().mean() < 0.05


@many
@given(windows(), sizes, st.booleans())
def test_average_pools(how, size, counted):
    compare(size, Node("pool", "average_pool", ("in",), OUT, {**how, "include_padding": counted}))


def test_a_window_that_overhangs_by_hand():
    """3 pixels, kernel 2, stride 2: the last window holds one pixel and nothing beyond, and its mean is that pixel."""
    how = {"kernel": [1, 2], "stride": [1, 2], "padding": [0, 0], "ceil": True, "include_padding": True}
    nodes = (
        Node("in", "quantize", (IMAGES,), Quantization(1.0, 0)),
        Node("pool", "average_pool", ("in",), Quantization(0.5, 0), how),
        Node("flat", "move", ("pool",), Quantization(0.5, 0), FLAT),
        Node("end", "dequantize", ("flat",)),
    )
    images = torch.tensor([[[[1.0, 4.0, 8.0]]]])
    assert OnnxRuntime().load(Network(nodes, (1, 1, 3)))(images).flatten().tolist() == [2.5, 8.0]


@many
@given(windows(), sizes, st.integers(1, 2))
def test_max_pools(how, size, dilation):
    compare(size, Node("pool", "max_pool", ("in",), IN, {**how, "dilation": [dilation, 1]}))


@many
@given(windows(), sizes, st.integers(1, 2), st.sampled_from([1, 2, 4]), st.booleans())
def test_convolutions(how, size, dilation, groups, exact):
    shape = (8, CHANNELS // groups, *how["kernel"])
    more = {"padding": how["padding"], "dilation": [1, dilation], "stride": how["stride"]}
    more["padding"] = [how["padding"][0], how["padding"][1] + (dilation - 1) * how["kernel"][1]]
    node = heavy("conv", ("in",), shape, None if exact else SIGNED, x_scale=IN.scale, groups=groups)
    compare(size, Node("conv", "conv", ("in",), node.output, {**node.attributes, **more}, node.tensors))


@many
@given(sizes, st.integers(1, 9), st.booleans(), st.booleans())
def test_matrix_products(size, outputs, flat, exact):
    width = CHANNELS * size[0] * size[1] if flat else size[1]
    product = heavy("product", ("rows" if flat else "in",), (outputs, width), None if exact else SIGNED)
    compare(size, *([Node("rows", "move", ("in",), IN, FLAT)] if flat else []), product)


@many
@given(sizes, st.integers(1, 3), st.sampled_from(["add", "multiply", "concatenate"]))
def test_two_inputs(size, channels, operator):
    """Of other ranges, and for products one that is broadcast, as squeeze and excitation do."""
    conv = heavy("conv", ("in",), (CHANNELS, CHANNELS, 1, 1), SIGNED, seed=channels)
    mean = Node("mean", "average_pool", ("conv",), Quantization(0.0131, 90), {"kernel": None, "keep": True})
    other = "mean" if operator == "multiply" else "conv"
    attributes = {"dim": 1 + channels % 3} if operator == "concatenate" else {}
    compare(size, conv, mean, Node("both", operator, ("in", other), OUT, attributes), engines=("onnxruntime", "x86"))


@many
@given(sizes, st.integers(0, 2**32), st.booleans())
def test_tables_and_means(size, seed, keep):
    table = torch.randint(0, 256, (256,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    lookup = Node("lookup", "lookup", ("in",), OUT, {"function": "aten.silu.default"}, {"table": table})
    mean = Node("mean", "average_pool", ("lookup",), IN, {"kernel": None, "keep": keep})
    for nodes in ([lookup], [lookup, mean]):
        compare(size, *nodes, engines=("onnxruntime", "x86"))


@many
@given(sizes, st.permutations([1, 2, 3]), st.integers(1, 3), st.integers(0, 2), st.integers(1, 5))
def test_moves(size, order, axis, start, length):
    channels, (height, width) = CHANNELS, size
    moves = {
        "aten.permute.default": [[0, *order]],
        "aten.transpose.int": [order[0] - 4, order[1]],
        "aten.reshape.default": [[-1, width, 2, channels // 2 * height]],
        "aten.slice.Tensor": [axis - 4, start, start + length],
    }
    for target, arguments in moves.items():
        attributes = {"target": target, "arguments": [{"input": 0}, *arguments]}
        compare(size, Node("moved", "move", ("in",), IN, attributes), engines=("onnxruntime", "x86"))


@many
@given(windows(), sizes, st.sampled_from(["conv2d", "max_pool2d", "linear", "relu", "mean", "adaptive_avg_pool2d"]))
def test_operators_in_floats(how, size, name):
    draw = torch.Generator().manual_seed(1)
    shape = (5, size[1]) if name == "linear" else (8, CHANNELS, *how["kernel"])
    tensors = {"weight": torch.randn(shape, generator=draw), "bias": torch.randn(shape[0], generator=draw)}
    own = [{"tensor": "weight"}, {"tensor": "bias"}]
    arguments = {
        "conv2d": [*own, how["stride"], how["padding"], [1, 1], 1],
        "max_pool2d": [how["kernel"], how["stride"], how["padding"], [1, 1], how["ceil"]],
        "linear": own,
        "relu": [],
        "mean": [[-1, -2], how["ceil"]],
        "adaptive_avg_pool2d": [[1, 1]],
    }[name]
    target = f"aten.{name}.{'dim' if name == 'mean' else 'default'}"
    attributes = {"target": target, "arguments": [{"input": 0}, *arguments]}
    real = Node("real", "dequantize", ("in",))
    compare(size, real, Node("float", "float", ("real",), None, attributes, tensors if own[0] in arguments else {}))


def test_a_sum_in_floats():
    nodes = [Node("one", "dequantize", ("in",)), Node("two", "float", ("one",), None, _call("relu.default", 1))]
    compare((5, 6), *nodes, Node("sum", "float", ("one", "two"), None, _call("add.Tensor", 2)))


def _call(name, inputs):
    return {"target": f"aten.{name}", "arguments": [{"input": place} for place in range(inputs)]}
