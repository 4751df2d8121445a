"""All measurements of one call, as stable keys and as a page for people."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torchvision

from largebatch.base.errors import UserError
from largebatch.bench import checkpoint, data, exchange, int8, loader, offload, profile, step, variants
from largebatch.bench.compare import spread
from largebatch.bench.config import BenchConfig
from largebatch.config.run import Config
from largebatch.data import sets
from largebatch.runtime.placement import Placement, place
from largebatch.runtime.world import hardware

Facts = dict[str, Any]
CPUINFO = Path("/proc/cpuinfo")


def bench(config: Config, asked: BenchConfig) -> Facts:
    """Measure, and return facts with stable keys; see :func:`as_text` for people.

    ``ratios`` are of images/s, ours over the peer: above 1, ours is faster. ``memory_bytes`` is what steps at
    each k add to a process. Of an exchange, ``ratios`` are of seconds, the tree's over DDP's: above 1, the tree is
    slower; ``overlap`` is explained at :func:`exchange.overlap`. Of a checkpoint, ``seconds`` are what it adds to the
    steps beside it, and ``share`` is the upper end of that, of the time between two. Of offloading, ``ratios`` are of
    seconds: below 1, ours is faster; see :func:`offload.time_offload`. Of integers, see
    :func:`int8.time_quantize`.

    Of decoding, seconds are the processor's; see :func:`data.time_data`.

    Args:
        config: Network, images, n, precision and threads; its k is not used.
        asked: What to measure.

    Raises:
        UserError: a number of processes that cannot be compared, data that are missing, a minibatch larger than
            its set.
    """
    if asked.what == "exchange":
        return _exchange(config, asked)
    if asked.what == "profile":
        return _profile(config, asked)
    if config.processes not in (None, 1):
        raise UserError(
            f"processes={config.processes} cannot be compared: bench runs in one process, but for exchange and profile."
        )
    config = replace(config, processes=1)
    if asked.what == "checkpoint":
        return _checkpoint(replace(config, k=asked.k[0], dataset=step.step_data(config.dataset)), asked)
    if asked.what == "offload":
        return _offload(config, asked)
    if asked.what == "quantize":
        return _quantize(config, asked)
    if asked.what == "data":
        return _data(config, asked)
    placement = place(config, hardware())
    facts: Facts = {
        "machine": machine(placement),
        "setting": {"n": config.n, "model": config.model.name, **asdict(asked)},
        "ratios": {},
        "images_per_second": {},
        "memory_bytes": {},
    }
    if "step" in asked.parts:
        _steps(config, asked, facts)
    if "loader" in asked.parts:
        _loaders(config, asked, placement, facts)
    facts["machine"]["load_at_end"] = os.getloadavg()[0]
    return facts


def _exchange(config: Config, asked: BenchConfig) -> Facts:
    placement = exchange.make_placement(config)
    facts: Facts = {"machine": machine(placement)}
    timings, size = exchange.time_exchange(config, placement, asked.repeats)
    data = config.dataset
    facts["setting"] = {
        "what": asked.what,
        "model": config.model.name,
        "processes": placement.processes,
        "n": config.n,
        "images": f"{data.channels}×{data.height}×{data.width}",
        "repeats": asked.repeats,
        **asdict(config.exchange),
    }
    facts["ratios"] = {
        "tree_vs_ddp": asdict(timings.cost("exchange_tree", "exchange_ddp")),
        "tree_vs_ddp_with_backward": asdict(timings.cost("both_tree", "both_ddp")),
    }
    facts["seconds"] = {name: statistics.median(seconds) for name, seconds in sorted(timings.seconds.items())}
    facts["overlap"] = {kind: asdict(exchange.overlap(timings.seconds, kind)) for kind in exchange.KINDS}
    facts["gradient_bytes"] = size
    facts["machine"]["load_at_end"] = os.getloadavg()[0]
    return facts


def _profile(config: Config, asked: BenchConfig) -> Facts:
    where = machine(place(replace(config, k=1, processes=1), hardware()))
    facts = profile.measure(config, asked.repeats)
    facts["machine"] = (
        f"{where['processor']}, {where['cores']} cores, {where['platform']}, torch {where['torch']}; load "
        f"{where['load_at_start']:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"
    )
    return facts


def _checkpoint(config: Config, asked: BenchConfig) -> Facts:
    placement = place(config, hardware())
    facts: Facts = {"machine": machine(placement)}
    timings, copies, size = checkpoint.time_checkpoint(config, placement, asked.repeats, asked.iterations)
    pairs = zip(timings.seconds["saving"], timings.seconds["calm"], strict=True)
    cost = spread([saving - calm for saving, calm in pairs])
    facts["setting"] = {
        "what": asked.what,
        "model": config.model.name,
        "k": config.k,
        "n": config.n,
        "minutes": config.checkpoint.minutes,
        "repeats": asked.repeats,
        "iterations": asked.iterations,
    }
    facts["checkpoint_bytes"] = size
    facts["seconds"] = {"checkpoint": asdict(cost), "copy": asdict(spread(copies))}
    facts["share"] = None if config.checkpoint.minutes == 0 else cost.high / (60 * config.checkpoint.minutes)
    facts["machine"]["load_at_end"] = os.getloadavg()[0]
    return facts


def _offload(config: Config, asked: BenchConfig) -> Facts:
    placement = place(config, hardware())
    torch.set_num_threads(placement.threads)
    facts: Facts = {"machine": machine(placement)}
    data = config.dataset
    facts["setting"] = {
        "what": asked.what,
        "model": config.model.name,
        "images": f"{data.channels}×{data.height}×{data.width}",
        "batches": list(asked.batches),
        "repeats": asked.repeats,
        "iterations": asked.iterations,
    }
    facts |= offload.time_offload(config, placement, asked.batches, asked.repeats, asked.iterations)
    facts["machine"]["load_at_end"] = os.getloadavg()[0]
    return facts


def _quantize(config: Config, asked: BenchConfig) -> Facts:
    placement = place(config, hardware())
    torch.set_num_threads(placement.threads)
    facts: Facts = {"machine": machine(placement)}
    files = asked.files
    facts["setting"] = {
        "what": asked.what,
        "model": config.model.name,
        "images": f"{files.channels}×{files.height}×{files.width}",
        "photographs": asked.photographs,
        "batches": list(asked.batches),
        "repeats": asked.repeats,
    }
    facts |= int8.time_quantize(config, placement, files, asked.photographs, asked.batches, asked.repeats)
    facts["machine"]["load_at_end"] = os.getloadavg()[0]
    return facts


def _steps(config: Config, asked: BenchConfig, facts: Facts) -> None:
    images = step.step_data(config.dataset)
    shape = f"{images.channels}×{images.height}×{images.width}"
    configs = [replace(config, k=k, dataset=images) for k in asked.k]
    runs = {one.k: (one, place(one, hardware())) for one in configs}
    first, *others = asked.k
    facts["setting"]["images"] = f"{images.name} {shape}"
    facts["setting"]["workers_per_pass"] = {f"k{k}": placed.workers_per_pass for k, (_, placed) in runs.items()}
    # First of all: a child's peak of resident memory starts from that of this process.
    for k, run in runs.items():
        facts["memory_bytes"][f"k{k}"] = step.peak_memory(*run)

    names = variants.sides_here(images, runs[first][1].device, asked.sides)
    if names:
        measured = variants.time_variants(configs[0], asked.k, names, asked.repeats, asked.iterations)
        facts["variants"] = variants.as_facts(measured, asked.k)
    against = step.time_against_plain(*runs[first], asked.repeats, asked.iterations)
    speeds = facts["images_per_second"]
    speeds["step"] = against.speed("ours")
    for peer in ("accumulation", "one_group"):
        facts["ratios"][f"step_vs_{peer}"] = asdict(against.ratio("ours", peer))
        speeds[f"plain_{peer}"] = against.speed(peer)
    if others:
        timings = step.time_workers(runs, asked.repeats, asked.iterations)
        speeds |= {f"step_k{k}": timings.speed(f"k{k}") for k in asked.k}
        for k in others:
            facts["ratios"][f"k{k}_vs_k{first}"] = asdict(timings.ratio(f"k{k}", f"k{first}"))


def _data(config: Config, asked: BenchConfig) -> Facts:
    facts: Facts = {"machine": machine(place(config, hardware()))}
    files = asked.files if sets.in_memory(config.dataset) else config.dataset
    loader.check_class_folders(files)
    with tempfile.TemporaryDirectory(prefix="largebatch-bench-") as directory:
        if not sets.search_path(files):
            files = loader.make_photographs(Path(directory, "photographs"), files, asked.photographs)
        shards = Path(directory, "shards")
        shards.mkdir()
        measured = data.data_facts(files, asked.repeats, shards)
    facts["setting"] = {"what": asked.what, "repeats": asked.repeats, "batch": data.BATCH}
    facts |= measured
    facts["machine"]["load_at_end"] = os.getloadavg()[0]
    return facts


def _loaders(config: Config, asked: BenchConfig, placement: Placement, facts: Facts) -> None:
    files = asked.files if sets.in_memory(config.dataset) else config.dataset
    with tempfile.TemporaryDirectory(prefix="largebatch-bench-") as directory:
        if not sets.search_path(files):
            files = loader.make_photographs(Path(directory), files, asked.photographs)
        what = loader.loading(files, config.loader, config.n, placement.threads)
        timings = loader.time_loaders(what, asked.repeats)
    facts["setting"]["loader_workers"] = what.workers
    facts["images_per_second"]["loader"] = timings.speed("ours")
    for peer in loader.PEERS:
        facts["ratios"][f"loader_vs_{peer}"] = asdict(timings.ratio("ours", peer))
        facts["images_per_second"][f"loader_{peer}"] = timings.speed(peer)


def machine(placement: Placement) -> Facts:
    """Return what the figures were measured on."""
    device = torch.cuda.get_device_name() if placement.device == "cuda" else placement.device
    return {
        "processor": _processor(),
        "cores": hardware().cores,
        "threads": placement.threads,
        "device": device,
        "precision": placement.precision,
        "channels_last": placement.channels_last,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "load_at_start": os.getloadavg()[0],
    }


def _processor() -> str:
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


NAMES = {
    "step_vs_accumulation": "step ÷ plain loop in micro-batches of n",
    "step_vs_one_group": "step ÷ plain loop in one pass, one BN group",
    "loader_vs_torchvision": "loader ÷ torchvision's usual transforms",
    "pillow": "crops ÷ ours with decoder=pillow",
    "tar_vs_folders": "ours from an archive ÷ from class folders",
    "tree_vs_ddp": "exchange: fixed tree (exact=true) ÷ DDP",
    "tree_vs_ddp_with_backward": "back-propagation with it: tree ÷ DDP",
    "backward": "back-propagation alone",
    "exchange_ddp": "exchange alone, DDP",
    "exchange_tree": "exchange alone, tree",
    "both_ddp": "both, DDP",
    "both_tree": "both, tree",
    "ddp": "DDP",
    "checkpoint": "that the run takes longer, all in all",
    "copy": "of them on the training path",
}


def as_text(facts: Facts) -> str:
    """Return the facts as a page for people."""
    if "passes" in facts:
        return "\n".join(profile.as_lines(facts))
    where, setting = facts["machine"], facts["setting"]
    lines = [
        f"{where['processor']}, {where['cores']} cores; {where['device']}, {where['threads']} threads, "
        f"{where['precision']}; torch {where['torch']}; load {where['load_at_start']:.1f} at the start, "
        f"{where['load_at_end']:.1f} at the end",
    ]
    if "checkpoint_bytes" in facts:
        lines.append(
            f"checkpoint: {facts['checkpoint_bytes'] / 1e6:,.1f} MB of {setting['model']}, beside "
            f"{setting['iterations']} steps of k={setting['k']} n={setting['n']}"
        )
        lines += _spreads("seconds a checkpoint", facts["seconds"])
        share = "–" if facts["share"] is None else f"{100 * facts['share']:.3f} %"
        return "\n".join([*lines, "", f"of a run with checkpoint.minutes={setting['minutes']:g}, at most: {share}"])
    if "ensemble" in facts:
        lines.append(f"offload: {setting['model']}, {facts['weight_bytes'] / 1e6:,.1f} MB, images {setting['images']}")
        return "\n".join([*lines, *offload.as_lines(facts)])
    if "exactness" in facts:
        lines.append(f"quantize: {setting['model']}, images {setting['images']}, random weights")
        return "\n".join([*lines, *int8.as_lines(facts)])
    if "file_bytes" in facts:
        return "\n".join([*lines, *data.as_lines(facts), *_spreads("images/s, ours ÷ peer", facts["ratios"])])
    if "overlap" in facts:
        lines.append(
            f"exchange: {facts['gradient_bytes'] / 1e6:,.1f} MB of gradients ({setting['model']}) between "
            f"{setting['processes']} processes; back-propagation over n={setting['n']} images {setting['images']}"
        )
        lines += _spreads("seconds, ours ÷ peer", facts["ratios"])
        lines += ["", f"{'seconds':<46} {'median':>8}"]
        lines += [f"{NAMES[name]:<46} {seconds:>8.4f}" for name, seconds in facts["seconds"].items()]
        return "\n".join([*lines, *_spreads("overlap: hidden share of the shorter of the two", facts["overlap"])])
    if "images" in setting:
        lines.append(f"step: {setting['model']}, {setting['images']}, k={setting['k'][0]} n={setting['n']}; ours cuts")
        lines[-1] += " its crops in every step, the plain loops find theirs ready"
    if "variants" in facts:
        lines += variants.as_lines(facts["variants"])
        lines += _spreads("images/s, one ÷ other", facts["variants"]["ratios"])
    lines += _spreads("images/s, ours ÷ peer", facts["ratios"])
    lines += ["", f"{'images/s':<46} {'median':>8}"]
    lines += [f"{name.replace('_', ' '):<46} {speed:>8,.0f}" for name, speed in facts["images_per_second"].items()]
    if facts["memory_bytes"]:
        lines += ["", f"{'memory that steps add':<46} {'MB':>8}"]
        lines += [f"{name:<46} {size / 1e6:>8,.1f}" for name, size in facts["memory_bytes"].items()]
    return "\n".join(lines)


def _spreads(title: str, spreads: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = ["", f"{title:<46} {'median':>8} {'95 % interval':>17}"]
    for name, one in spreads.items():
        shown = NAMES.get(name, name.replace("_vs_", " ÷ "))
        lines.append(f"{shown:<46} {one['median']:>8.3f} {one['low']:>8.3f} – {one['high']:.3f}")
    return lines
