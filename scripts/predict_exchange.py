"""Hold the exchange and the stragglers of ``largebatch predict`` against real exchanges whose computing is asleep.

    python scripts/predict_exchange.py > results/predict/exchange.json

P processes sleep through their passes, as a processor does while a GPU computes. How long a pass takes is drawn anew in
every step, and gradients are added over gloo meanwhile, message by message. The link is measured before, between two
processes.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.distributed

from largebatch.bench.profile import link
from largebatch.cost_model.model import Question, predict
from largebatch.cost_model.profile import Link, Pass, Profile
from largebatch.runtime.placement import Placement
from largebatch.runtime.processes import launch
from largebatch.runtime.world import join, leave

FORWARD, BACKWARD, STD = 0.040, 0.080, 0.008  # seconds
STEPS, REPEATS = 40, 15
SIZES = {"hidden": (8, 1_000_000), "exposed": (8, 16_000_000)}  # messages, bytes of each
PROCESSES = (1, 2, 4)


def placed(processes: int) -> Placement:
    return Placement(processes, 1, 1, 1, 1, "cpu", "fp32", False)


def all_reduces(placement: Placement, size: int) -> tuple[float, float]:
    """Return the median seconds of adding next to nothing, and ``size`` bytes."""
    world = join(placement)
    found = []
    for numbers in (4, size // 4):
        values, seconds = torch.zeros(numbers), []
        for _ in range(REPEATS):
            world.barrier()
            started = time.perf_counter()
            torch.distributed.all_reduce(values)
            seconds.append(time.perf_counter() - started)
        found.append(statistics.median(seconds))
    leave()
    return found[0], found[1]


def steps(placement: Placement, messages: int, size: int) -> list[float]:
    """Return the seconds of every step."""
    world = join(placement)
    random = np.random.default_rng(world.rank)
    buckets = [torch.zeros(size // 4) for _ in range(messages)]
    seconds = []
    world.barrier()
    for _ in range(STEPS):
        started = time.perf_counter()
        # Late in the forward part: all of back-propagation is there to hide the exchange.
        time.sleep(max(0.0, FORWARD + random.normal(0.0, STD)))
        under_way = []
        begun = time.perf_counter()
        for number, bucket in enumerate(buckets, start=1):
            time.sleep(max(0.0, begun + BACKWARD * number / messages - time.perf_counter()))
            if world.size > 1:
                under_way.append(torch.distributed.all_reduce(bucket, async_op=True))
        for work in under_way:
            work.wait()
        seconds.append(time.perf_counter() - started)
    leave()
    return seconds


def profile_of(messages: int, size: int, measured: Link) -> Profile:
    """Return the profile of the sleeping passes with a link that was measured."""
    return Profile(
        schema=1,
        source="",
        machine="",
        device="a sleeping process",
        model="none",
        images="",
        precision="fp32",
        n=1,
        train_images=1000,
        val_images=0,
        passes=(Pass(1, 1000 * (FORWARD + BACKWARD), 1000 * STD, 1000 * BACKWARD, ()),),
        update_ms=0.0,
        gradient_bytes=messages * size,
        messages=messages,
        overlap=1.0,
        loading_images_per_second=None,
        gpus_per_node=max(PROCESSES),
        links=(measured,),
    )


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name, (messages, size) in SIZES.items():
        tiny, whole = launch(all_reduces, (placed(2), size), 2, 1)
        measured = Link(**link(tiny, whole, 2, size))
        for processes in PROCESSES:
            seconds = launch(steps, (placed(processes), messages, size), processes, 1)[2:]
            told = predict(profile_of(messages, size, measured), Question(epochs=1), processes, processes)
            rows.append(
                {
                    "exchange": name,
                    "processes": processes,
                    "measured_ms": 1000 * statistics.fmean(seconds),
                    "standard_error_ms": 1000 * statistics.stdev(seconds) / math.sqrt(len(seconds)),
                    "predicted_ms": 1000 * told.iteration,
                    "exchange_ms": 1000 * told.exchange,
                    "stragglers_ms": 1000 * told.stragglers,
                    "latency_us": measured.latency_us,
                    "gbit_per_second": measured.gbit_per_second,
                    "load": os.getloadavg()[0],
                }
            )
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
