"""Proof that a network ran in integers: from the profiler, the operators that ran in one pass."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from largebatch.base.errors import Fault
from largebatch.quantization.engines.cuda import KERNEL, Cuda, in_floats
from largebatch.quantization.engines.onnxruntime import OnnxRuntime, start
from largebatch.quantization.network import HEAVY, IMAGES, Engine, Network

# Convolutions and matrix products, by the names under which the profilers know them. Of PyTorch's, each name is the one
# that every such call passes once.
IN_INTEGERS = {
    *("onednn::qconv2d_pointwise", "onednn::qlinear_pointwise", KERNEL),
    *("QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"),
}
IN_FLOATS = {
    *("aten::_convolution", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm"),
    *("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"),
}
PRODUCTS = ("conv", "linear", "mm", "matmul", "einsum", "attention")


@dataclass(frozen=True)
class Proof:
    """Operators that ran in one pass.

    Attributes:
        operators: Calls by the name that the profiler knows, convolutions and matrix products alone.
        integer: Of them in integers.
        floating: Of them in floats; no more than the network has by choice, and the engine by :func:`in_floats`.
    """

    operators: Mapping[str, int]
    integer: int
    floating: int


def prove(engine: Engine, network: Network, images: Tensor) -> Proof:
    """Run one pass under the profiler, and return what ran.

    Raises:
        Fault: a convolution or a matrix product that should be in integers ran in floats, or not at all.
    """
    ran = _of_session(network, images) if engine.name == OnnxRuntime.name else _of_torch(engine, network, images)
    operators = {name: calls for name, calls in sorted(ran.items()) if name in IN_INTEGERS | IN_FLOATS}
    proof = Proof(
        operators,
        sum(calls for name, calls in operators.items() if name in IN_INTEGERS),
        sum(calls for name, calls in operators.items() if name in IN_FLOATS),
    )
    excused = len(in_floats(network)) if engine.name == Cuda.name else 0
    wanted = sum(node.operator in HEAVY for node in network) - excused
    kept = sum(node.operator == "float" and _is_product(node.attributes["target"]) for node in network)
    allowed = kept + excused
    if proof.integer < wanted or proof.floating > allowed:
        raise Fault(
            f"engine={engine.name} ran {proof.integer} of {wanted} convolutions and matrix products in integers and "
            f"{proof.floating} in floats, where {allowed} should: {operators}. Its figures are no figures of integers."
        )
    return proof


def _is_product(target: str) -> bool:
    return any(word in target for word in PRODUCTS)


def _of_torch(engine: Engine, network: Network, images: Tensor) -> Counter[str]:
    # PyTorch's profiler reports on itself, by the line, unless it is asked not to.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    program = engine.load(network)
    program(images)  # what prepares itself in the first pass is not what is asked about
    # Launches of Triton's kernels are known to the GPU's profiler alone.
    cuda = engine.name == Cuda.name
    with torch.autograd.profiler.profile(use_kineto=cuda, use_device="cuda" if cuda else None) as profile:
        program(images)
    return Counter({event.key: event.count for event in profile.key_averages()})


def _of_session(network: Network, images: Tensor) -> Counter[str]:
    with tempfile.TemporaryDirectory() as directory:
        session = start(network, profile=str(Path(directory) / "profile"))
        session.run(None, {IMAGES: images.contiguous().numpy()})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    return Counter(event["args"]["op_name"] for event in kernels)
