"""Measure a profile of this machine for ``largebatch predict``: a pass, its spread, the exchange, the loader."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from tqdm import tqdm

from largebatch.base.errors import UserError
from largebatch.bench.compare import Side, take_turns
from largebatch.bench.exchange import Either, Pass
from largebatch.bench.step import Ours, make_ours, make_plain, step_data
from largebatch.config.run import Config
from largebatch.data import sets
from largebatch.data.loading import PREFETCH
from largebatch.models import build_model
from largebatch.runtime.placement import Placement, place
from largebatch.runtime.processes import launch
from largebatch.runtime.world import World, hardware, leave, started_outside
from largebatch.training.exchange import Averaging
from largebatch.training.learner import DTYPES, open_data, start
from largebatch.training.pitfalls import sample_stream

TOGETHER = (1, 2, 4, 8)  # workers a pass on a GPU, as placement chooses them; elsewhere 1
TINY = 4  # numbers in a message that takes its latency
LEAST_BYTES = 4 * 2**20  # of one that shows the bandwidth
LOADED = 50  # batches

Profile = dict[str, Any]


def measure(config: Config, repeats: int) -> Profile:
    """Measure, and return a profile as :class:`~.cost_model.profile.Profile` describes it, but for ``machine``.

    Args:
        config: Network, images, n, precision, threads; ``processes`` is of the exchange alone: by default as many as
            there are GPUs, or 2 on the processor. One process leaves the links unknown.
        repeats: Steps for every number of workers a pass.

    Raises:
        UserError: a launcher outside, data that are missing.
    """
    if started_outside() != (None, None):
        raise UserError("bench profile starts its own processes: run it without torchrun.")
    alone = replace(config, k=1, processes=1, dataset=step_data(config.dataset))
    placement = place(alone, hardware())
    together = TOGETHER if placement.device == "cuda" and not config.exact else (1,)
    passes, updates, gradient_bytes = [], [], 0
    for workers in together:
        one = replace(alone, k=workers, workers_per_pass=workers)
        ours = make_ours(one, place(one, hardware()))
        gradient_bytes = sum(p.numel() * p.element_size() for p in ours.learner.model.parameters() if p.requires_grad)
        timed, update = time_passes(ours, repeats)
        passes.append({"workers": workers, **timed})
        updates.append(update)
    messages = math.ceil(gradient_bytes / config.exchange.bucket_bytes)
    if config.exchange.compress == "bf16":
        gradient_bytes //= 2
    processes = config.processes or (hardware().gpus if placement.device == "cuda" else 2)
    links: list[dict[str, Any]] = []
    hidden = 1.0
    if processes > 1:
        many = replace(alone, k=processes, processes=processes, workers_per_pass=1)
        shared = place(many, hardware())
        links, hidden = launch(
            _time_links, (many, shared, messages, gradient_bytes / messages, repeats), processes, shared.threads
        )
    data = config.dataset
    return {
        "schema": 1,
        "source": f"measured by `largebatch bench profile`: {repeats} steps, {processes} processes",
        "device": _device(placement),
        "model": config.model.name,
        "images": f"{data.channels}×{data.height}×{data.width}",
        "precision": placement.precision,
        "n": config.n,
        "train_images": data.train_images or alone.dataset.train_images,
        "val_images": data.val_images or 0,
        "passes": passes,
        "update_ms": statistics.fmean(updates),
        "gradient_bytes": gradient_bytes,
        "messages": messages,
        "overlap": hidden,
        "loading_images_per_second": loading_speed(config),
        "gpus_per_node": processes,
        "links": links,
    }


def _device(placement: Placement) -> str:
    if placement.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{placement.threads} thread{'s' * (placement.threads > 1)} of a {placement.device.upper()}"


def time_passes(ours: Ours, repeats: int) -> tuple[dict[str, Any], float]:
    """Time steps of one pass, and by a plain loop over the same images which shares of one are what.

    Returns:
        The keys of a pass, and the update in ms.
    """
    plain = make_plain(ours, ours.learner.config.minibatch)
    images, labels = plain.batches[0]
    device = ours.learner.world.device

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    steps, parts = [], []
    for repeat in tqdm(range(repeats + 2), desc="profile", unit="step", disable=None, leave=False):
        started = now()
        ours.step()
        ended = now()
        plain.optimizer.zero_grad()
        begun = now()
        with plain.autocast():
            loss = F.cross_entropy(plain.model(images), labels)
        forward = now()
        loss.backward()  # type: ignore[no-untyped-call]
        backward = now()
        plain.optimizer.step()
        whole = now() - begun
        if repeat > 1:  # the first ones choose their kernels
            steps.append(1000 * (ended - started))
            parts.append(((backward - forward) / whole, 1 - (backward - begun) / whole))
    mean = statistics.fmean(steps)
    back, update = (mean * statistics.median(column) for column in zip(*parts, strict=True))
    spread = statistics.stdev(steps) if len(steps) > 1 else 0.0
    return {"mean_ms": mean - update, "std_ms": spread, "backward_ms": back, "steps_ms": steps}, update


def loading_speed(config: Config) -> float | None:
    """Return the images/s of the loader processes of one GPU's share of the processor; None without image files."""
    if sets.in_memory(config.dataset) or not sets.search_path(config.dataset):
        return None
    share = replace(config, k=1, processes=1)
    placement = replace(place(share, hardware()), cores=max(1, hardware().cores // max(1, hardware().gpus)))
    world = start(share, placement)
    source = open_data(share, placement, world)
    stream = sample_stream(share, source.train_images)
    ahead = (share.loader.workers or placement.cores) * (share.loader.prefetch or PREFETCH)
    loaded = source.train(stream.passes(0, ahead + max(LOADED, ahead), 0, 1, 1))
    for _ in itertools.islice(loaded, ahead):  # starting the processes is not counted
        pass
    started = time.perf_counter()
    count = sum(len(batch.labels) for batch in loaded)
    return count / (time.perf_counter() - started)


def _time_links(
    config: Config, placement: Placement, messages: int, size: float, repeats: int
) -> tuple[list[dict[str, Any]], float]:
    """Return the link between the processes, from all-reduces of two sizes, and the share of them that is hidden.

    ``size`` is of a message, in bytes.
    """
    timed = max(size, LEAST_BYTES)
    world = start(config, placement)
    data, dtype = config.dataset, DTYPES[placement.precision]

    def network() -> Either:
        torch.manual_seed(config.seed)
        model = build_model(config.model, data.classes or 1000, data.channels).to(world.device, dtype).train()
        return Either(model.to(memory_format=torch.channels_last) if placement.channels_last else model)

    images = torch.randn(config.n, data.channels, data.height, data.width, dtype=dtype, device=world.device)
    joined = Averaging(network(), world, config.exchange)
    alone = Averaging(network(), World(0, 1, world.device), config.exchange)
    # With images first: DDP cuts its buckets in the order in which the first gradients arrive.
    both = Pass(joined, world, placement.precision, images)
    backward = Pass(alone, world, placement.precision, images)

    def adding(numbers: int) -> Side:
        values = torch.zeros(numbers, device=world.device)

        def turn() -> None:
            torch.distributed.all_reduce(values)
            if world.device.type != "cpu":
                torch.accelerator.synchronize()

        return Side(turn, 0, world.barrier)

    sides = {"tiny": adding(TINY), "message": adding(math.ceil(timed / 4))}
    if messages > 1:
        sides = {
            "both": Side(both.turn, 0, both.prepare),
            "backward": Side(backward.turn, 0, backward.prepare),
            **sides,
        }
    timings = take_turns(sides, repeats, "exchange", shown=world.main)
    seconds = {name: statistics.median(turns) for name, turns in timings.seconds.items()}
    leave()
    known = link(seconds["tiny"], seconds["message"], world.size, timed)
    return [known], overlap({**seconds, "message": time_of(size, seconds, timed)}, messages)


def time_of(size: float, seconds: Mapping[str, float], timed: float) -> float:
    """Return the seconds of a message of ``size`` bytes, from those of a ``tiny`` one and of one of ``timed`` bytes."""
    return seconds["tiny"] + (seconds["message"] - seconds["tiny"]) * size / timed


def link(tiny: float, message: float, processes: int, size: float) -> dict[str, Any]:
    """Return α and 1/β from the seconds of two all-reduces in a ring: of next to nothing, and of ``size`` bytes.

    2(p − 1) messages take 2(p − 1) α and 2(p − 1)/p · bβ.
    """
    steps = 2 * (processes - 1)
    per_byte = max(message - tiny, 1e-9) / (steps / processes * size)
    return {"between": "gpus", "latency_us": 1e6 * tiny / steps, "gbit_per_second": 8e-9 / per_byte}


def overlap(seconds: Mapping[str, float], messages: int) -> float:
    """Return which share of what can be hidden behind back-propagation was: of all messages but the last.

    Args:
        seconds: Of one message, of a back-propagation, and of both together with all messages.
        messages: How many.
    """
    if messages == 1:
        return 1.0
    one, back = seconds["message"], seconds["backward"]
    least = one + (messages - 1) * max(0.0, one - back / messages)
    hidden = messages * one - (seconds["both"] - back)
    return min(1.0, max(0.0, hidden / (messages * one - least)))


def as_lines(profile: Mapping[str, Any]) -> list[str]:
    """Return the profile as a page for people."""
    lines = [
        f"profile: {profile['model']} of {profile['images']}, n={profile['n']}, {profile['precision']}, on "
        f"{profile['device']}; {profile['machine']}",
        "",
        f"{'workers a pass':<16} {'pass, ms':>10} {'spread, std':>12} {'backward':>10} {'images/s':>10}",
    ]
    for one in profile["passes"]:
        speed = 1000 * one["workers"] * profile["n"] / (one["mean_ms"] + profile["update_ms"])
        times = f"{one['mean_ms']:>10.2f} {one['std_ms']:>12.2f} {one['backward_ms']:>10.2f}"
        lines.append(f"{one['workers']:<16} {times} {speed:>10,.0f}")
    lines += [
        "",
        f"update {profile['update_ms']:.2f} ms; {profile['gradient_bytes'] / 1e6:,.1f} MB of gradients in "
        f"{profile['messages']} messages, overlap {profile['overlap']:.2f}",
    ]
    for one in profile["links"]:
        lines.append(f"between {one['between']}: {one['latency_us']:.0f} µs and {one['gbit_per_second']:.1f} Gbit/s")
    loading = profile["loading_images_per_second"]
    lines.append(
        "no image files: loading is not measured" if loading is None else f"loading {loading:,.0f} images/s a GPU"
    )
    return lines
