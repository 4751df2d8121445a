"""Evaluation with weights that travel, compared with all weights on the device."""

from __future__ import annotations

import copy
import functools
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.bench.compare import Side, Spread, Timings, spread, take_turns
from largebatch.config.run import Config
from largebatch.models import build_model
from largebatch.offloading import Statistics, offload
from largebatch.offloading.flat import pages
from largebatch.offloading.groups import cut
from largebatch.offloading.transport import make_transport
from largebatch.runtime.placement import Placement

MEMBERS = 6  # of the ensemble
STATM = Path("/proc/self/statm")

Facts = dict[str, Any]
# Takes a model in host memory for as long as the stack is open; what it returns is called after every pass.
Start = Callable[[nn.Module, torch.device, ExitStack], Callable[[], None]]


def _nothing() -> None:
    pass


def _resident(model: nn.Module, device: torch.device, stack: ExitStack) -> Callable[[], None]:
    model.to(device)
    return _nothing


def _ours(groups: str, model: nn.Module, device: torch.device, stack: ExitStack) -> Callable[[], None]:
    stack.enter_context(offload(model, device, groups=groups))
    return _nothing


OURS: dict[str, Start] = {"leaf": functools.partial(_ours, "leaf"), "bytes": functools.partial(_ours, "bytes")}
# Other libraries that offload, by name: scripts/peers/offloading.py fills it, the package has none.
PEERS: dict[str, Start] = {}


@dataclass
class Pass:
    """One side's model, and what a pass of it is."""

    model: nn.Module
    after: Callable[[], None]
    images: Tensor
    bf16: bool

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return outputs, when they are there."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.bf16):
            output: Tensor = self.model(self.images)
        self.after()
        _synchronise(self.images.device)
        return output


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_offload(config: Config, placement: Placement, batches: Sequence[int], repeats: int, passes: int) -> Facts:
    """Measure one network at several batch sizes, and an ensemble at the largest.

    Args:
        config: Network and shape of the images.
        placement: Device, precision and memory format.
        batches: Images of a pass.
        repeats: Timed turns of each side.
        passes: Of a turn.

    Returns:
        ``memory`` of each side, ``batches`` with seconds, ratios and overlap by batch size, and ``ensemble``.
    """
    device = torch.device(placement.device)
    torch.manual_seed(config.seed)
    model = build_model(config.model, config.dataset.classes or 1000, config.dataset.channels).eval()
    if placement.channels_last:
        model.to(memory_format=torch.channels_last)
    images = {batch: _images(config, batch, device) for batch in batches}
    bf16 = placement.precision == "bf16"
    facts: Facts = {"weight_bytes": _weights(model), "memory": {}, "batches": {}}
    for name, start in {"resident": _resident, **OURS, **PEERS}.items():
        facts["memory"][name] = _memory(name, start, model, images[min(batches)], bf16)
    for batch in batches:
        facts["batches"][batch] = _time(model, images[batch], bf16, repeats, passes)
    facts["ensemble"] = _ensemble(model, images[max(batches)], bf16, repeats, passes)
    return facts


def _images(config: Config, batch: int, device: torch.device) -> Tensor:
    data = config.dataset
    return torch.randn(batch, data.channels, data.height, data.width, device=device)


def _weights(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _memory(name: str, start: Start, model: nn.Module, images: Tensor, bf16: bool) -> Facts:
    """Return what one side takes alone: device memory at its peak, and growth of the host's, both in bytes.

    On the device, activations are included; on the CPU both are null for all but what ours knows of itself.
    """
    cuda = images.device.type == "cuda"
    own = copy.deepcopy(model)
    host = _host_bytes()
    before = torch.cuda.memory_allocated(images.device) if cuda else 0
    with ExitStack() as stack:
        one = Pass(own, start(own, images.device, stack), images, bf16)
        one()  # what is measured is not the first pass, which may trace or pin
        if cuda:
            torch.cuda.reset_peak_memory_stats(images.device)
        one()
        peak = torch.cuda.max_memory_allocated(images.device) - before if cuda else None
        now = _host_bytes()
        growth = None if host is None or now is None else now - host
    facts: Facts = {"device_bytes": peak, "host_growth_bytes": growth}
    if name in OURS:
        grouping = cut({"": copy.deepcopy(model)}, name, None, 2)
        facts |= {"planned_weight_bytes": grouping.peak, "groups": len(grouping.parts)}
    return facts


def _host_bytes() -> int | None:
    if not STATM.exists():
        return None
    return int(STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _time(model: nn.Module, images: Tensor, bf16: bool, repeats: int, passes: int) -> Facts:
    device = images.device
    with ExitStack() as stack:
        running: dict[str, Pass] = {}
        for name, start in {"resident": _resident, **OURS, **PEERS}.items():
            own = copy.deepcopy(model)
            running[name] = Pass(own, start(own, device, stack), images, bf16)
        expected = running["resident"]()
        differences = {name: (one() - expected).abs().max().item() for name, one in running.items()}
        turns = {name: _times(passes, one) for name, one in running.items()}
        groups = {name: [part.size for part in cut({"": copy.deepcopy(model)}, name, None, 2).parts] for name in OURS}
        for name, sizes in groups.items():
            turns[f"copies_{name}"] = _times(passes, stack.enter_context(_copying(sizes, device)))
        timings = take_turns(
            {name: Side(turn, passes * len(images)) for name, turn in turns.items()}, repeats, "offload"
        )
    return {
        "seconds": {name: statistics.median(seconds) / passes for name, seconds in timings.seconds.items()},
        "ratios": {
            f"{name}_vs_resident": asdict(timings.cost(name, "resident")) for name in running if name != "resident"
        }
        | {f"{ours}_vs_{peer}": asdict(timings.cost(ours, peer)) for ours in OURS for peer in PEERS},
        "overlap": {name: asdict(overlap(timings, name)) for name in OURS},
        "difference": differences,
    }


def _times(count: int, call: Callable[[], object]) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(count):
            call()

    return turn


def overlap(timings: Timings, name: str) -> Spread:
    """Return max(compute, copy) ÷ time, round by round: 1 where the shorter of the two is hidden altogether."""
    rounds = zip(timings.seconds["resident"], timings.seconds[f"copies_{name}"], timings.seconds[name], strict=True)
    return spread([max(compute, moving) / both for compute, moving, both in rounds])


@contextmanager
def _copying(sizes: Sequence[int], device: torch.device) -> Iterator[Callable[[], None]]:
    """Yield a call that copies groups of these sizes to the device, and nothing else."""
    transport = make_transport(device)
    slot = transport.allocate(max(sizes))
    host = pages(max(sizes))
    host.zero_()
    transport.pin(host)

    def copies() -> None:
        for size in sizes:
            transport.copy(slot, host[:size])
        transport.close()

    try:
        yield copies
    finally:
        transport.release(slot)
        transport.unpin(host)


def _ensemble(model: nn.Module, images: Tensor, bf16: bool, repeats: int, passes: int) -> Facts:
    """Time members that take turns on the device, beside the same members all on it."""
    device = images.device
    members = {f"member_{number}": copy.deepcopy(model) for number in range(MEMBERS)}
    resident = {name: copy.deepcopy(member).to(device) for name, member in members.items()}

    def one_after_the_other(models: Mapping[str, nn.Module]) -> Callable[[], None]:
        def turn() -> None:
            for member in models.values():
                for _ in range(passes):
                    Pass(member, _nothing, images, bf16)()

        return turn

    with offload(members, device, mode="model") as moved:
        one_after_the_other(members)()
        once = copy.copy(moved)
        turns = {"model": one_after_the_other(members), "resident": one_after_the_other(resident)}
        timings = take_turns({name: Side(turn, len(images)) for name, turn in turns.items()}, repeats, "ensemble")
    return {
        "members": MEMBERS,
        "uploads": once.uploads,
        "models_on_the_device": _at_once(once),
        "ratios": {"model_vs_resident": asdict(timings.cost("model", "resident"))},
    }


def _at_once(figures: Statistics) -> float:
    return figures.peak_bytes * figures.groups / figures.weight_bytes


def as_lines(facts: Facts) -> list[str]:
    """Return tables for people."""
    weights = facts["weight_bytes"]
    lines = [
        "",
        f"{'memory':<36} {'planned weights':>18} {'on the device':>15} {'more on the host':>18}",
    ]
    for name, one in facts["memory"].items():
        planned = one.get("planned_weight_bytes")
        shown = "–" if planned is None else f"{planned / 1e6:,.1f} MB {100 * planned / weights:>4.1f} %"
        lines.append(
            f"{NAMES[name]:<36} {shown:>18} {_mega(one['device_bytes']):>15} {_mega(one['host_growth_bytes']):>18}"
        )
    for batch, one in facts["batches"].items():
        lines += [
            "",
            f"{f'batch of {batch}':<36} {'ms a pass':>12} {'÷ resident':>12} {'overlap':>9} {'difference':>12}",
        ]
        for name, seconds in one["seconds"].items():
            ratio, hidden = one["ratios"].get(f"{name}_vs_resident"), one["overlap"].get(name)
            lines.append(
                f"{NAMES[name]:<36} {1e3 * seconds:>12,.2f} {_median(ratio):>12} {_median(hidden):>9} "
                f"{one['difference'].get(name, '–')!s:>12}"
            )
    group = facts["ensemble"]
    cost = group["ratios"]["model_vs_resident"]
    lines += [
        "",
        f"ensemble of {group['members']}: {group['uploads']} uploads, {group['models_on_the_device']:g} models on the "
        f"device, {cost['median']:.3f} × the time of all resident ({cost['low']:.3f} – {cost['high']:.3f})",
    ]
    return lines


def _mega(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.1f} MB"


def _median(one: Mapping[str, float] | None) -> str:
    return "–" if one is None else f"{one['median']:.3f}"


NAMES = {
    "resident": "all weights on the device",
    "leaf": "ours, groups=leaf",
    "bytes": "ours, groups=bytes",
    "copies_leaf": "copies alone, groups=leaf",
    "copies_bytes": "copies alone, groups=bytes",
}
