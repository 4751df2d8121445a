"""Records of runs that never took place, with numbers that a test knows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from largebatch.config.run import Config
from largebatch.records.read import default_directory
from largebatch.records.write import write_json

EPOCHS = 6


def changed(config: Config, settings: dict[str, Any]) -> Config:
    """Return the configuration with dotted keys set."""
    values = config.to_mapping()
    for key, value in settings.items():
        *path, last = key.split(".")
        place = values
        for name in path:
            place = place[name]
        place[last] = value
    return Config.from_mapping(values)


def ending(error: float) -> list[float]:
    """Return validation errors of EPOCHS epochs whose median of the last five is ``error``."""
    return [80.0, error + 9, error - 1, error, error + 1, error - 9]


def write_run(
    parent: Path,
    config: Config,
    val_errors: Sequence[float],
    train_errors: Sequence[float] | None = None,
    status: str = "done",
    final_error: float | None = None,
    seconds: float = 60.0,
    images_per_second: float = 1000.0,
    device: str = "cpu",
    logged: int = 0,
    starts: int = 1,
    processes: int = 1,
    command: str = "largebatch train",
) -> Path:
    """Write a record as :mod:`largebatch.records.write` does, and return its directory.

    Args:
        logged: Iteration lines an epoch.
        starts: How often it was started.
        final_error: What the summary says; by default what is true where ``val_errors`` come from :func:`ending`.
    """
    directory = default_directory(config, config.run_hash("fp32"), parent)
    directory.mkdir(parents=True)
    origin = {
        "schema": 1,
        "experiment_hash": config.experiment_hash("fp32"),
        "run_hash": config.run_hash("fp32"),
        "experiment": config.experiment("fp32"),
        "seed": config.seed,
        "devices": [device] * processes,
        "command": command,
    }
    write_json(directory / "provenance.json", origin)
    final = sorted(val_errors[-5:])[2] if final_error is None and len(val_errors) >= 5 else final_error
    write_json(directory / "summary.json", {"schema": 1, "status": status, "final_error": final, "seconds": seconds})
    (directory / "config.yaml").write_text("k: 1\n")
    (directory / "starts.jsonl").write_text("{}\n" * starts)
    with (directory / "metrics.jsonl").open("w") as file:
        for number, error in enumerate(val_errors):
            for line in range(logged):
                iteration = number * logged + line + 1
                values = {"iteration": iteration, "epoch": iteration / logged, "rate": 0.1, "loss": 2.5}
                file.write(json.dumps({"kind": "iteration", **values, "train_error": 50.0}) + "\n")
            epoch = {
                "kind": "epoch",
                "epoch": number + 1,
                "iteration": 10 * (number + 1),
                "train_error": error if train_errors is None else train_errors[number],
                "val_error": error,
                "val_loss": None,
                "images_per_second": images_per_second,
                "seconds": seconds / len(val_errors),
            }
            file.write(json.dumps(epoch) + "\n")
    return directory


def end_point(largest: int, steps: int = 8) -> list[float]:
    """Return errors that are at most 1 up to ``largest`` steps."""
    return [0.0, *(0.9 if number <= largest else 1.1 for number in range(2, steps + 1))]


def probe_line(
    epoch: float,
    largest: int = 8,
    squared: float = 1.0,
    trace: float = 160.0,
    sharpness: float = 1.0,
    rate: float = 0.1,
    **more: Any,
) -> dict[str, Any]:
    """Return a line of ``probes.jsonl``, of eight small steps, ten iterations an epoch."""
    values = {
        "iteration": round(epoch * 10),
        "epoch": epoch,
        "rate": rate,
        "small_rate": rate,
        "cosine": [0.5] * 7,
        "distance": [0.5] * 7,
        "end_point": end_point(largest),
        "gradient_squared": squared,
        "noise_trace": trace,
        "sharpness": sharpness,
        "sharpness_converged": True,
        "rate_times_sharpness": rate * sharpness,
        "stability_bound": 3.8 / 2.8,
        "bn_mean_moved": None,
        "bn_variance_moved": None,
        "seconds": 2.0,
    }
    return values | more
