"""Networks in integers on x86 processors: oneDNN's kernels for bytes, called as PyTorch ships them.

They are the kernels that PyTorch's own way there (export, quantizer, inductor) ends at, without that way: nothing to
compile, no pattern that may fail to match, and scales that are the network's own, so that every node can be compared.
PyTorch's ``onednn::qadd`` and ``qmul`` are not used: in torch 2.15 both are wrong for tensors of more than a few
elements. Residuals are added by the convolution before them.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from largebatch.quantization.engines.plain import Step, program
from largebatch.quantization.network import Network, Node, Program, Quantization
from largebatch.quantization.reference import Step as ReferenceStep
from largebatch.quantization.saturation import refuse_overflow, saturates

# Kernels want their weights in an order that depends on the shape of the images, and would bring another one into it in
# every pass, slowly. A set has batches of two sizes: the last one is another.
PACKED = functools.lru_cache(maxsize=2)


@dataclass(frozen=True)
class X86:
    """oneDNN's int8 kernels: AVX2, AVX-512, VNNI or AMX, what the processor has."""

    name: str = "x86"

    def available(self) -> str | None:
        """Return None on an x86 processor with AVX2, else why not."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return f"engine=x86 needs an x86 processor, and this is {platform.machine()}: use engine=onnxruntime."
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return "engine=x86 needs a PyTorch with oneDNN, and this one has none: use engine=onnxruntime."
        if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
            return "engine=x86 needs a processor with AVX2: use engine=onnxruntime."
        return None

    def load(self, network: Network) -> Program:
        """Return the network ready to run on the CPU, its weights in the order that the kernels want.

        Raises:
            UserError: its sums could overflow on this processor: see :mod:`largebatch.quantization.saturation`.
        """
        refuse_overflow(self.name, network, overflows)
        return load_unchecked(network)


@functools.cache
def overflows() -> bool:
    """Return whether oneDNN's kernels overflow 16 bits on this processor."""
    return saturates(load_unchecked)


def load_unchecked(network: Network) -> Program:
    """Return a network ready to run, also where its sums would overflow: to measure what that does."""
    spent = _spent(network)
    kernels = {
        "conv": lambda node, given: convolution(node, given, node.name in spent),
        "linear": product,
        "max_pool": _max_pool,
        "lookup": _lookup,
        "concatenate": _concatenate,
        "multiply": _multiply,
    }
    run = program(network, kernels)
    return lambda images: run(images.cpu())


def _spent(network: Network) -> set[str]:
    """Return the convolutions that may write over their residual: nobody reads it later, under any name."""
    views = {node.name for node in network if node.operator == "move"}
    views |= {name for node in network if node.operator == "move" for name in node.inputs}
    last = {name: node.name for node in network for name in node.inputs}
    return {
        node.name
        for node in network
        if node.operator == "conv"
        and len(set(node.inputs)) == 2
        and last[node.inputs[1]] == node.name
        and node.inputs[1] not in views
    }


def _weights(node: Node, of_x: Quantization) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales, zero points, and the bias in real values, as the kernels take them."""
    scale = node.tensors["weight_scale"]
    bias = (node.tensors["bias"].double() * of_x.scale * scale.double()).float()
    return scale, torch.zeros(len(scale), dtype=torch.int64), bias


def _ending(output: Quantization | None) -> tuple[float, int, torch.dtype, str]:
    """Return scale, zero point and type of what a kernel makes, and the function that it applies last."""
    if output is None:
        return 1.0, 0, torch.float32, "none"
    return output.scale, output.zero_point, torch.uint8, "relu" if output.low == output.zero_point else "none"


def _clipped(y: Tensor, output: Quantization | None) -> Tensor:
    """Apply the bounds that neither the type nor the kernel has applied."""
    if output is None:
        return y
    low = 0 if output.low == output.zero_point else output.low
    return y if low == 0 and output.high == 255 else y.clamp_(low, output.high)


def convolution(node: Node, given: Sequence[Quantization], spent: bool = False) -> Step:
    """Return a convolution, from bytes to bytes or to float32; where ``spent``, it writes over its residual."""
    output, of_x, how = node.output, given[0], node.attributes
    scale, zeros, bias = _weights(node, of_x)
    shape = (list(how["stride"]), list(how["padding"]), list(how["dilation"]), how["groups"])
    read = (of_x.scale, of_x.zero_point)
    *to, after = _ending(output)

    @PACKED
    def packed(size: torch.Size) -> Tensor:
        weight: Tensor = torch.ops.onednn.qconv_prepack(node.tensors["weight"], scale, *read, *shape, list(size))
        return weight

    def alone(x: Tensor) -> Tensor:
        weights = (packed(x.shape), scale, zeros)
        y = torch.ops.onednn.qconv2d_pointwise(x, *read, *weights, bias, *shape, *to, after, [], "")
        return _clipped(y, output)

    def added(x: Tensor, r: Tensor) -> Tensor:
        onto = (r if spent else r.clone()).contiguous(memory_format=torch.channels_last)
        weights = (packed(x.shape), scale, zeros)
        of_r = (given[1].scale, given[1].zero_point)
        y = torch.ops.onednn.qconv2d_pointwise.binary(
            x, *read, *weights, onto, bias, *shape, *to, *of_r, "sum", 1.0, after, [], ""
        )
        return _clipped(y, output)

    return alone if len(given) == 1 else added


def product(node: Node, given: Sequence[Quantization]) -> Step:
    """Return a matrix product, from bytes to bytes or to float32."""
    output, of_x = node.output, given[0]
    scale, zeros, bias = _weights(node, of_x)

    @PACKED
    def packed(size: torch.Size) -> Tensor:
        weight: Tensor = torch.ops.onednn.qlinear_prepack(node.tensors["weight"], list(size))
        return weight

    def multiplied(x: Tensor, to: Quantization | None) -> Tensor:
        y = torch.ops.onednn.qlinear_pointwise(
            x, of_x.scale, of_x.zero_point, packed(x.shape), scale, zeros, bias, *_ending(to), [], ""
        )
        return _clipped(y, to)

    def added(x: Tensor, r: Tensor) -> Tensor:
        assert output is not None
        residual = (r.float() - given[1].zero_point) * given[1].scale
        real = (multiplied(x, None) + residual) / output.scale
        return (real.round_() + output.zero_point).clamp_(output.low, output.high).to(torch.uint8)

    return (lambda x: multiplied(x, output)) if len(given) == 1 else added


def _lookup(node: Node, given: Sequence[Quantization]) -> Step:
    return _by_table(node.tensors["table"])


def _by_table(table: Tensor) -> Step:
    """Return a function of bytes by a table of 256, which Python's own reads 30 times as fast as indexing does."""
    entries = bytes(table.tolist())

    def step(x: Tensor) -> Tensor:
        # As they lie in memory: channels last, or as they are counted.
        order = (0, 2, 3, 1) if x.dim() == 4 and not x.is_contiguous() else tuple(range(x.dim()))
        laid = x.permute(order).contiguous()
        y = torch.frombuffer(bytearray(laid.numpy()).translate(entries), dtype=torch.uint8).view(laid.shape)
        return y.permute(0, 3, 1, 2) if order == (0, 2, 3, 1) else y

    return step


def _concatenate(node: Node, given: Sequence[Quantization]) -> Step:
    """Return a concatenation; inputs that are read as its output is are copied, others go through a table."""
    output, dim = node.output, node.attributes["dim"]
    assert output is not None
    numbers = torch.arange(256, dtype=torch.uint8)
    steps = []
    for read in given:
        same = (read.scale, read.zero_point) == (output.scale, output.zero_point)
        alone = ReferenceStep(replace(node, attributes={"dim": 0}), [read])
        steps.append(None if same and (output.low, output.high) == (0, 255) else _by_table(alone(numbers)))

    def step(*several: Tensor) -> Tensor:
        parts = [part if one is None else one(part) for one, part in zip(steps, several, strict=True)]
        if parts[0].dim() != 4 or dim != 1:
            return torch.cat(parts, dim)
        batch, _, height, width = parts[0].shape
        channels = [part.shape[1] for part in parts]
        size, last = (batch, sum(channels), height, width), torch.channels_last
        y = torch.empty(size, dtype=torch.uint8, memory_format=last)
        for place, part in zip(torch.split(y, channels, 1), parts, strict=True):
            place.copy_(part)
        return y

    return step


def _multiply(node: Node, given: Sequence[Quantization]) -> Step:
    """Return a product: of two bytes it is exact in float32, where passes over a tensor can be in place."""
    output, (of_x, of_r) = node.output, given
    assert output is not None
    multiplier = float(torch.tensor(of_x.scale * of_r.scale / output.scale, dtype=torch.float32))

    def step(x: Tensor, r: Tensor) -> Tensor:
        product = x.float().sub_(of_x.zero_point) * r.float().sub_(of_r.zero_point)
        real = product.mul_(multiplier).round_().add_(output.zero_point)
        return real.clamp_(output.low, output.high).to(torch.uint8)

    return step


def _max_pool(node: Node, given: Sequence[Quantization]) -> Step:
    how = [list(node.attributes[key]) for key in ("kernel", "stride", "padding", "dilation")]
    ceil = bool(node.attributes["ceil"])
    # aten::max_pool2d counts the pixels of a map in the type of its elements, 255 at most: this one takes any bytes.
    return lambda x: torch.ops.quantized.max_pool2d(x, *how, ceil)
