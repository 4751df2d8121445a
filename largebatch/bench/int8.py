"""Networks in 8-bit integers: exactness, speed compared with floats, size, and time to calibrate."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.base.errors import UserError
from largebatch.bench.compare import Side, take_turns
from largebatch.bench.loader import make_photographs
from largebatch.config.groups import DatasetConfig, LoaderConfig
from largebatch.config.run import Config
from largebatch.data.source import Target, open_source
from largebatch.models import build_model
from largebatch.offloading.fold import fold_batchnorm
from largebatch.quantization.calibrate import observe, ranges
from largebatch.quantization.choose import must_avoid_overflow
from largebatch.quantization.engines import x86
from largebatch.quantization.engines.onnxruntime import OnnxRuntime
from largebatch.quantization.engines.x86 import X86
from largebatch.quantization.lower import Recipe, lower, needed
from largebatch.quantization.network import HEAVY, IMAGES, Engine, Network, Node, Quantization, unfused
from largebatch.quantization.pipeline import calibration_images
from largebatch.quantization.proof import prove
from largebatch.quantization.reference import IntegerNetwork, Reference, Step
from largebatch.quantization.saturation import audit, instructions
from largebatch.quantization.trace import trace
from largebatch.runtime.placement import Placement

Facts = dict[str, Any]
Pass = Callable[[Tensor], object]
CALIBRATIONS = 3  # timed turns, at most
COMPARED = 4  # images that the engines are held against the oracle with
KERNELS = {"conv": x86.convolution, "linear": x86.product}
# What makes other sides of a network in floats and images to calibrate with: scripts/peers/integers.py fills it.
PEERS: list[Callable[[nn.Module, Tensor], dict[str, Pass]]] = []
BFLOAT16 = {"amx_bf16", "avx512_bf16"}  # without them it is emulated


def time_quantize(
    config: Config, placement: Placement, files: DatasetConfig, photographs: int, batches: Sequence[int], repeats: int
) -> Facts:
    """Quantize one network with random weights, calibrated on photographs, and measure it.

    Args:
        config: Network and seed.
        placement: Threads.
        files: Shape of the images; their directory, or None for photographs that are made here.
        photographs: Training images to calibrate with.
        batches: Images of a timed pass.
        repeats: Timed turns of each side.

    Returns:
        ``weights``: bytes; ``calibration``: its time over that of the forward passes; ``operators`` that ran, by
        engine; ``exactness`` against the oracle; ``decibels`` of the logits, on a processor without VNNI also of those
        that would be silently wrong; ``batches``: seconds and ratios of images/s by batch size.

    Raises:
        UserError: no engine for integers can run here.
    """
    engines = [engine for engine in (X86(), OnnxRuntime()) if engine.available() is None]
    if not engines:
        raise UserError(f"bench quantize has nothing to measure: {X86().available()} {OnnxRuntime().available()}")
    torch.manual_seed(config.seed)
    model = build_model(config.model, files.classes or 1000, files.channels).eval()
    fold_batchnorm(model)
    with tempfile.TemporaryDirectory() as directory:
        calibration = list(_images(Path(directory), files, photographs, placement.cores))
    whole = torch.cat(calibration)
    floats = trace(model, (files.channels, files.height, files.width))
    recipe = Recipe(safe=must_avoid_overflow())
    found, cost = _calibrated(floats, calibration, needed(floats, recipe), min(repeats, CALIBRATIONS))
    reach = ranges(found, "minmax")
    network, careless = (lower(floats, reach, how).network for how in (recipe, Recipe()))
    given = calibration[0][:COMPARED]
    with torch.inference_mode():
        exact = model(given)
    logits = {engine.name: engine.load(network)(given) for engine in (Reference(), *engines)}
    if recipe.safe:
        logits["x86_overflowing"] = x86.load_unchecked(careless)(given)
    sides = _sides(model, network, engines, whole)
    return {
        "processor_has": instructions(),
        "overflows": recipe.safe,
        "could_overflow": sum(map(len, audit(careless).values())),
        "weights": _sizes(model, network),
        "calibration": cost,
        "operators": {engine.name: asdict(prove(engine, network, given)) for engine in engines},
        "float_operators": network.float_operators,
        "exactness": {engine.name: exactness(engine, network, given) for engine in engines},
        "decibels": {name: decibels(exact, one) for name, one in logits.items()},
        "batches": {batch: _time(sides, _several(whole, batch), repeats) for batch in batches},
    }


def _images(root: Path, files: DatasetConfig, photographs: int, cores: int) -> Iterator[Tensor]:
    """Yield training images as validation images are prepared."""
    files = files if files.root else make_photographs(root, files, photographs)
    source = open_source(
        files, LoaderConfig(workers=0, prefetch=1), 0, Target(torch.device("cpu"), torch.float32), cores
    )
    yield from calibration_images(source, 0, min(photographs, source.train_images))


def _several(images: Tensor, count: int) -> Tensor:
    return torch.cat([images] * math.ceil(count / len(images)))[:count].contiguous(memory_format=torch.channels_last)


def _calibrated(floats: Network, images: Sequence[Tensor], names: Sequence[str], repeats: int) -> tuple[Any, Facts]:
    """Return histograms, and what they cost beside forward passes of the same network over the same images."""
    module = IntegerNetwork(floats).eval()
    found = {}

    @torch.inference_mode()
    def forward() -> None:
        for batch in images:
            module(batch)

    def observed() -> None:
        found.update(observe(floats, images, names))

    count = sum(map(len, images))
    sides = {"calibration": Side(observed, count), "forward": Side(forward, count)}
    timings = take_turns(sides, repeats, "calibration")
    seconds = {name: statistics.median(turns) for name, turns in timings.seconds.items()}
    return found, {"images": count, "seconds": seconds, "ratio": asdict(timings.cost("calibration", "forward"))}


def _sizes(model: nn.Module, network: Network) -> Facts:
    floats = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    integers = sum(tensor.nbytes for node in network for tensor in node.tensors.values())
    return {"float_bytes": floats, "integer_bytes": integers, "share": integers / floats}


def decibels(exact: Tensor, approximate: Tensor) -> float:
    """Return the ratio of signal to error, of their squares."""
    error = (exact.double() - approximate.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / error))


def exactness(engine: Engine, network: Network, images: Tensor) -> Facts:
    """Hold every convolution and matrix product of an engine against the oracle, each given the oracle's own inputs.

    Returns:
        ``nodes`` compared; ``largest``, the largest difference of their outputs in units; ``share`` of the outputs that
        differ; for the engine x86 ``wrong_accumulators``: how many of the sums alone differ.
    """
    ours = engine.name == X86.name
    network = network if ours else unfused(network)
    values: dict[str, Tensor] = {}
    read = network.outputs()
    compared, wrong_sums = [], 0
    with torch.inference_mode():
        IntegerNetwork(network)(images, values.__setitem__)
        for node in (node for node in network if node.operator in HEAVY):
            given = [one for name in node.inputs if (one := read[name]) is not None]
            inputs = [values[name] for name in node.inputs]
            kernel = KERNELS[node.operator](node, given) if ours else _session(engine, node, given[0])
            got = kernel(*inputs)
            compared.append(_units(node, got, values[node.name]))
            wrong_sums += _wrong_sums(node, given[0], inputs[0]) if ours else 0
    difference = torch.cat(compared)
    facts: Facts = {"nodes": len(compared), "largest": float(difference.max())}
    facts["share"] = float((difference > 0.5).double().mean())
    return facts | ({"wrong_accumulators": wrong_sums} if ours else {})


def _units(node: Node, got: Tensor, expected: Tensor) -> Tensor:
    """Return differences in units; a unit of outputs in floats, as logits are, is a 255th of their range."""
    low, high = expected.float().aminmax()
    unit = 1.0 if node.output else float(high - low) / 255
    return ((got.reshape(expected.shape).float() - expected.float()) / unit).abs().flatten()


def _session(engine: Engine, node: Node, given: Quantization) -> Callable[[Tensor], Tensor]:
    """Return one node alone on an engine, from integers to integers."""
    flat = {"target": "aten.flatten.using_ints", "arguments": [{"input": 0}, 1]}

    def run(x: Tensor) -> Tensor:
        nodes = [Node("x", "quantize", (IMAGES,), given), replace(node, inputs=("x",))]
        nodes += [Node("flat", "move", (node.name,), node.output, flat)] if x.dim() == 4 else []
        nodes += [Node("real", "dequantize", (nodes[-1].name,))] if node.output else []
        alone = Network(tuple(nodes), tuple(x.shape[1:]))  # type: ignore[arg-type]  # of a matrix product: (inputs,)
        real = engine.load(alone)((x.float() - given.zero_point) * given.scale)
        return real if node.output is None else (real / node.output.scale).round() + node.output.zero_point

    return run


def _wrong_sums(node: Node, given: Quantization, x: Tensor) -> int:
    """Return how many accumulators differ from the oracle's, as float32: exact below 2^24."""
    ones = torch.ones_like(node.tensors["weight_scale"])
    tensors = {**node.tensors, "weight_scale": ones, "bias": torch.zeros_like(node.tensors["bias"])}
    bare, raw = replace(node, output=None, tensors=tensors), replace(given, scale=1.0)
    sums = KERNELS[node.operator](bare, [raw])(x)
    return int((sums != Step(bare, [raw]).accumulators(x).float()).sum())


def _sides(model: nn.Module, network: Network, engines: Sequence[Engine], calibration: Tensor) -> dict[str, Pass]:
    """Return what takes turns, ours first."""
    sides: dict[str, Pass] = {engine.name: engine.load(network) for engine in engines}
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    sides["float32"] = last
    if BFLOAT16 & set(instructions()):
        half = copy.deepcopy(last).bfloat16()
        sides["bfloat16"] = lambda given: half(given.bfloat16())
    for peer in PEERS:
        sides |= peer(model, calibration)
    return sides


def _time(sides: Mapping[str, Pass], images: Tensor, repeats: int) -> Facts:
    """Time passes over one batch."""

    def turn(side: Pass) -> Callable[[], None]:
        @torch.inference_mode()
        def run() -> None:
            side(images)

        return run

    timings = take_turns({name: Side(turn(side), len(images)) for name, side in sides.items()}, repeats, "quantize")
    ours, *others = sides
    return {
        "seconds": {name: statistics.median(seconds) for name, seconds in timings.seconds.items()},
        "ratios": {f"{ours}_vs_{name}": asdict(timings.ratio(ours, name)) for name in others},
    }


def as_lines(facts: Facts) -> list[str]:
    """Return tables for people."""
    weights, cost = facts["weights"], facts["calibration"]
    lines = [
        f"processor has {', '.join(facts['processor_has']) or '?'}; sums of {facts['could_overflow']} channels "
        f"{'overflow 16 bits here: their weights take less of their range' if facts['overflows'] else 'would overflow'}"
        f"{'' if facts['overflows'] else ' 16 bits without VNNI'}",
        f"weights: {weights['integer_bytes'] / 1e6:,.2f} MB of {weights['float_bytes'] / 1e6:,.2f} MB in floats: "
        f"{weights['share']:.3f}",
        f"calibration with {cost['images']} images: {cost['ratio']['median']:.2f} × the time of the forward passes "
        f"({cost['ratio']['low']:.2f} – {cost['ratio']['high']:.2f})",
        "",
        f"{'':<28} {'integer':>8} {'float':>6} {'nodes':>6} {'largest':>8} {'share that differs':>19} {'logits':>9}",
    ]
    for name, one in facts["exactness"].items():
        ran = facts["operators"][name]
        lines.append(
            f"{NAMES[name]:<28} {ran['integer']:>8} {ran['floating']:>6} {one['nodes']:>6} {one['largest']:>8.3g} "
            f"{one['share']:>19.2g} {facts['decibels'][name]:>6.1f} dB"
        )
    if "x86_overflowing" in facts["decibels"]:
        lines.append(f"logits of weights that overflow: {facts['decibels']['x86_overflowing']:.1f} dB")
    for batch, one in facts["batches"].items():
        lines += ["", f"{f'batch of {batch}':<28} {'ms':>9} {'ours is faster by':>18} {'95 % interval':>17}"]
        for name, seconds in one["seconds"].items():
            ratio = next((each for pair, each in one["ratios"].items() if pair.endswith(f"_vs_{name}")), None)
            shown = f"{ratio['median']:>18.2f} {ratio['low']:>9.2f} – {ratio['high']:.2f}" if ratio else ""
            lines.append(f"{NAMES[name]:<28} {1e3 * seconds:>9,.1f} {shown}".rstrip())
    return lines


NAMES = {
    "x86": "ours, engine=x86",
    "onnxruntime": "ours, engine=onnxruntime",
    "float32": "float32, BatchNorm folded",
    "bfloat16": "bfloat16, BatchNorm folded",
}
