"""Write the golden run: the loss at every iteration of a short float64 run, which no refactor may move.

    make golden

The commit that changes tests/training/golden/digits.json must say why the numbers moved.
"""

import json
import sys
import tempfile
from pathlib import Path

from largebatch.cli.main import run
from largebatch.records.read import read_metrics

FILE = Path(__file__).parents[1] / "tests" / "training" / "golden" / "digits.json"
# 44 iterations an epoch: warmup until 22, a decay at 44.
ARGUMENTS = [
    "k=4",
    "n=8",
    "model=resnet8",
    "dataset=digits",
    "lr.base_minibatch=8",
    "epochs=2",
    "warmup.epochs=0.5",
    "schedule.milestones=[1]",
    "iterations=60",
    "precision=fp64",
    "device=cpu",
    "threads=1",
    "log_every=1",
]


def losses(directory: Path) -> list[float]:
    """Train the golden run in ``directory``, and return the loss of every iteration."""
    status = run(["train", *ARGUMENTS, f"run_dir={directory}"])
    if status:
        raise SystemExit(status)
    return [line["loss"] for line in read_metrics(directory, "iteration")]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        measured = losses(Path(temporary) / "run")
    FILE.parent.mkdir(exist_ok=True)
    command = "largebatch train " + " ".join(ARGUMENTS)
    FILE.write_text(json.dumps({"command": command, "losses": measured}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(measured)} losses written to {FILE}", file=sys.stderr)
