"""Hold the model of ``largebatch predict`` against real steps over gloo on this machine, in turns.

    python scripts/predict_check.py model=resnet18 > results/predict/resnet18.json

Process groups of 1, 2 and 4 lie ready and take turns, a step of k = 4 workers each, so that other work on the machine
slows all of them; so do what the profile is made of: a step of one worker, all-reduces between two processes, and
back-propagation with them. The words are those of `largebatch train`.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from largebatch.bench.compare import spread
from largebatch.bench.profile import LEAST_BYTES, link, time_passes
from largebatch.bench.step import make_ours
from largebatch.cli.compose import configuration_directory
from largebatch.config.run import Config
from largebatch.cost_model.model import Question, predict
from largebatch.cost_model.profile import Link, Pass, Profile
from largebatch.models import build_model
from largebatch.runtime.placement import place
from largebatch.runtime.processes import launch
from largebatch.runtime.world import hardware, leave

WORDS = ["dataset=synthetic_small", "n=32", "threads=1", "device=cpu", "warmup=none", "workers_per_pass=1"]
WORKERS, ROUNDS = 4, 15
SIDES = {"one": (1, 1), "p1": (WORKERS, 1), "p2": (WORKERS, 2), "p4": (WORKERS, 4)}  # k and processes


def composed(words: list[str], k: int, processes: int) -> Config:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(version_base="1.3", config_dir=str(configuration_directory())):
        values = OmegaConf.to_container(compose("train", overrides=[*WORDS, *words]), resolve=True)
    values.pop("experiment", None)
    return replace(Config.from_mapping(values), k=k, processes=processes)


def side(words: list[str], name: str, folder: Path) -> None:
    """Be one side: make a step whenever the file of a round appears, and leave its seconds there."""
    k, processes = SIDES[name]
    config = composed(words, k, processes)
    launch(turns, (config, name, folder), processes, 1)


def turns(config: Config, name: str, folder: Path) -> None:
    ours = make_ours(config, place(config, hardware(), config.processes))
    world = ours.learner.world
    message = torch.zeros(max(message_of(ours.learner.model)[1], LEAST_BYTES) // 4)
    for number in range(ROUNDS + 2):
        while world.main and not (folder / f"{name}-{number}-go").exists():
            time.sleep(0.01)
        world.barrier()
        times = {}
        started = time.perf_counter()
        ours.step()
        times["step"] = time.perf_counter() - started
        if name == "p2":
            for size, values in (("tiny", torch.zeros(4)), ("message", message)):
                world.barrier()
                started = time.perf_counter()
                torch.distributed.all_reduce(values)
                times[size] = time.perf_counter() - started
        if name == "one":
            times |= dict(zip(("pass", "update"), time_passes(ours, 1), strict=True))
        if world.main:
            done = folder / f"{name}-{number}"
            done.with_suffix(".new").write_text(json.dumps(times))
            done.with_suffix(".new").rename(done)
    leave()


def message_of(model: torch.nn.Module) -> tuple[int, int]:
    """Return how many messages the gradients are, as DDP cuts them, and the bytes of each."""
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    messages = math.ceil(size / (25 * 2**20))
    return messages, size // messages


def measure(words: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return what every side left in each round, the first two not counted."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        started = [
            subprocess.Popen([sys.executable, __file__, "--side", name, temporary, *words], stdout=sys.stderr)
            for name in SIDES
        ]
        for number in range(ROUNDS + 2):
            for name in SIDES if number % 2 else reversed(SIDES):
                (folder / f"{name}-{number}-go").touch()
                while not (folder / f"{name}-{number}").exists():
                    assert not any(process.poll() for process in started), "a side has failed"
                    time.sleep(0.01)
                if number > 1:
                    found[name].append(json.loads((folder / f"{name}-{number}").read_text()))
        for process in started:
            process.wait()
    return found


def main(words: list[str]) -> None:
    load = os.getloadavg()[0]
    found = measure(words)
    config = composed(words, 1, 1)
    one, two = found["one"], found["p2"]
    update = statistics.median(line["update"] for line in one)
    tiny, message = (statistics.median(line[size] for line in two) for size in ("tiny", "message"))
    steps = [1000 * line["step"] for line in one]
    messages, size = message_of(build_model(config.model, config.dataset.classes or 1000, config.dataset.channels))
    share = statistics.median(line["pass"]["backward_ms"] / line["pass"]["mean_ms"] for line in one)
    mean = statistics.median(steps) - update
    profile = Profile(
        schema=1,
        source="scripts/predict_check.py",
        machine="",
        device="1 thread of a CPU",
        model=config.model.name,
        images="3×32×32",
        precision="fp32",
        n=config.n,
        train_images=100_000,
        val_images=0,
        passes=(Pass(1, mean, statistics.stdev(steps), share * mean, ()),),
        update_ms=update,
        gradient_bytes=messages * size,
        messages=messages,
        overlap=0.0,
        loading_images_per_second=None,
        gpus_per_node=4,
        links=(Link(**link(tiny, message, 2, max(size, LEAST_BYTES))),),
    )
    rows = []
    for name, (k, processes) in SIDES.items():
        measured = spread([1000 * line["step"] for line in found[name]])
        told = predict(profile, Question(epochs=1), k, processes)
        ratios = spread([told.iteration / line["step"] for line in found[name]])
        rows.append(
            {
                "k": k,
                "processes": processes,
                "measured_ms": vars(measured),
                "predicted_ms": 1000 * told.iteration,
                "computing_ms": 1000 * told.computing,
                "exchange_ms": 1000 * told.exchange,
                "stragglers_ms": 1000 * told.stragglers,
                "predicted_over_measured": vars(ratios),
            }
        )
    print(
        json.dumps(
            {
                "model": config.model.name,
                "rounds": ROUNDS,
                "load": [load, os.getloadavg()[0]],
                "link": vars(profile.links[0]),
                "messages": messages,
                "message_bytes": size,
                "pass_ms": mean,
                "pass_std_ms": profile.passes[0].std_ms,
                "rows": rows,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side(sys.argv[4:], sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1:])
