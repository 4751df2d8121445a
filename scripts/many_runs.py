"""Write records of many runs that never took place, to measure how fast reports read them.

    python scripts/many_runs.py /tmp/many
    time largebatch table runs=/tmp/many

By default 200 runs (40 minibatch sizes, 5 seeds) of 90 epochs with 1,000 logged iterations each: about 2.6 GB.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from pathlib import Path
from statistics import median
from typing import Any

from largebatch.config.build import digest
from largebatch.records.read import read_provenance

SEEDS = 5
TEMPLATE = Path(__file__).parents[1] / "results" / "digits-curves" / "k4-n8-gradual-s0-d0957eeb"


def epoch_line(epoch: int, epochs: int, iteration: int, noise: random.Random) -> dict[str, Any]:
    """Return an epoch's line: an error that falls from 100 % to about 24 %."""
    error = 24 + 76 * 0.93 ** (epoch * 90 / epochs) + noise.gauss(0, 0.1)
    return {
        "kind": "epoch",
        "epoch": epoch,
        "iteration": iteration,
        "rate": 0.1,
        "train_loss": error / 25,
        "train_error": error,
        "val_error": error + noise.gauss(0, 0.1),
        "val_error_top5": error / 3,
        "val_loss": error / 24,
        "images_per_second": noise.gauss(2500, 50),
        "seconds": noise.gauss(520, 10),
        "nonfinite": 0,
        "replaced": 0,
        "val_unreadable": 0,
    }


def iteration_lines(epoch: int, lines: int) -> str:
    """Return the lines of an epoch's iterations."""
    values = {"rate": 0.30000000000000004, "loss": 2.2836406230926514, "train_error": 53.41796875}
    return "".join(
        json.dumps({"kind": "iteration", "iteration": 10 * at, "epoch": at / lines, **values}) + "\n"
        for at in range((epoch - 1) * lines + 1, epoch * lines + 1)
    )


def write(directory: Path, number: int, epochs: int, blocks: list[str]) -> None:
    """Write one run's record."""
    noise = random.Random(number)
    origin = copy.deepcopy(read_provenance(TEMPLATE) or {})
    k, seed = 4 * (1 + number // SEEDS), number % SEEDS
    origin["experiment"] |= {"k": k, "epochs": epochs}
    experiment = origin["experiment"]
    origin |= {"seed": seed, "experiment_hash": digest(experiment), "run_hash": digest({**experiment, "seed": seed})}
    lines = len(blocks[0].splitlines())
    ends = [epoch_line(epoch, epochs, 10 * lines * epoch, noise) for epoch in range(1, epochs + 1)]
    final = median(line["val_error"] for line in ends[-5:])
    run = directory / f"k{k}-s{seed}"
    run.mkdir(parents=True, exist_ok=True)
    (run / "provenance.json").write_text(json.dumps(origin, indent=2), encoding="utf-8")
    summary = {"schema": 1, "status": "done", "final_error": final, "seconds": 50000.0}
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for block, line in zip(blocks, ends, strict=True):
            file.write(block + json.dumps(line) + "\n")


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--lines", type=int, default=1000, help="logged iterations an epoch")
    arguments = parser.parse_args()
    blocks = [iteration_lines(epoch, arguments.lines) for epoch in range(1, arguments.epochs + 1)]
    for number in range(arguments.runs):
        write(arguments.directory, number, arguments.epochs, blocks)


if __name__ == "__main__":
    main()
