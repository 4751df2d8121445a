"""Kill runs, stop them, tear their checkpoints, and see that what is resumed is what was never interrupted.

    .venv/bin/python scripts/torture.py --minutes 10 --out results/reliability/torture.json

Random configurations of a small run are trained to the end once, and once under faults: SIGKILL at random moments and
in the middle of a checkpoint's write, SIGTERM, SIGINT, a pause by SIGSTOP, a rank killed under its launcher, files
truncated, bits flipped, a writer's left-overs. Every process is real. Weights must have the same bytes and records the
same lines (but for times). Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from largebatch.records.read import read_metrics, read_summary
from largebatch.training import checkpoint

PATIENCE = 300  # seconds before a run is taken for hung
TIMES = ("seconds", "images_per_second")
FORKS = multiprocessing.get_context("forkserver")
# The server has torch imported already: a run then starts in a tenth of a second.
FORKS.set_forkserver_preload(["largebatch.training.loop", "largebatch.cli.main", "sklearn.datasets", "hydra", "timm"])
DATA = (
    "dataset=synthetic",
    "dataset.train_images=163",
    "dataset.val_images=40",
    "dataset.classes=10",
    "dataset.channels=1",
    "dataset.height=8",
    "dataset.width=8",
    "dataset.mean=[0.5]",
    "dataset.std=[0.25]",
    "dataset.crop=pad",
    "dataset.pad=1",
    "dataset.flip=true",
)


def _command(arguments: Sequence[str], output: Path) -> None:
    """Be the command, in a fresh process of the server's."""
    os.setsid()
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["largebatch", *arguments]
    from largebatch.cli.main import main

    main()


def start(directory: Path, words: Sequence[str]) -> ForkServerProcess:
    """Start ``largebatch train`` on a run directory; what it prints goes to ``<directory>.txt``."""
    output = directory.with_name(f"{directory.name}.txt")
    arguments = ["train", *words, f"run_dir='{directory}'"]
    process = FORKS.Process(target=_command, args=(arguments, output))
    process.start()
    return process


def end(process: ForkServerProcess) -> int:
    """Wait for a process, and return its exit status, negative for a signal."""
    process.join(PATIENCE)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        raise SystemExit(f"process {process.pid} did not end within {PATIENCE} s")
    return process.exitcode


def result(directory: Path) -> dict[str, Any]:
    """Return all of a run that a fault must not change."""
    lines = [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(directory)]
    summary = {key: value for key, value in (read_summary(directory) or {}).items() if key not in TIMES}
    return {"weights": (directory / "model.safetensors").read_bytes(), "lines": lines, "summary": summary}


def random_words(chance: random.Random) -> list[str]:
    """Return a random small run."""
    k = chance.choice([1, 2, 4])
    exact = chance.random() < 0.25
    words = [
        *DATA,
        f"k={k}",
        f"n={chance.choice([4, 8])}",
        f"seed={chance.randrange(1000)}",
        f"epochs={chance.randint(2, 4)}",
        f"warmup={chance.choice(['none', 'constant', 'gradual'])}",
        f"optimizer={chance.choice(['sgd', 'sgd', 'lars', 'lamb'])}",
        f"bn.running={chance.choice(['worker0', 'mean'])}",
        f"bn.recompute={chance.choice(['true', 'false'])}",
        f"precision={chance.choice(['fp32', 'fp64'])}",
        f"exact={str(exact).lower()}",
        f"log_every={chance.choice([1, 3, 10])}",
        f"checkpoint.every={chance.choice([1, 2, 3, 7])}",
        f"checkpoint.keep={chance.choice([2, 2, 3])}",
        "lr.base_minibatch=16",
        "device=cpu",
        "threads=1",
        "deterministic=true",
    ]
    if k > 1 and chance.random() < 0.3:
        words.append("processes=2")
    return words


class Torture:
    """One run under faults, and what was done to it."""

    def __init__(self, directory: Path, words: Sequence[str], chance: random.Random, counts: Counter[str]) -> None:
        self.directory, self.words, self.chance, self.counts = directory, [*words, "resume=true"], chance, counts
        self.checkpoints = directory / "checkpoints"

    def run(self, length: float, faults: int) -> None:
        """Let the run live through ``faults`` faults at random moments, then end.

        Args:
            length: Seconds that it takes undisturbed: faults come within it.
            faults: How many.
        """
        while True:
            process = start(self.directory, self.words)
            if faults > 0:
                faults -= 1
                self._strike(process, self.chance.uniform(0, length))
            status = end(process)
            if status == 0:
                return
            if status not in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 75, 130):
                raise SystemExit(f"exit status {status}: see {self.directory}.txt")
            if self.chance.random() < 0.4:
                self._tear()

    def _strike(self, process: ForkServerProcess, seconds: float) -> None:
        kinds = ["kill", "kill", "write", "write", "SIGTERM", "SIGINT", "twice", "pause"]
        kind = self.chance.choice([*kinds, *["rank"] * 4] if "processes=2" in self.words else kinds)
        pid = process.pid or 0
        if kind == "write":
            self._until(process, lambda: any(self.checkpoints.glob(".*.tmp")), 10)
        elif kind == "rank":  # most of such a run is its start: the ranks shall be there
            self._until(process, lambda: len(_children(pid)) == 2, PATIENCE)
            self._until(process, lambda: False, self.chance.uniform(0, 5))
        else:
            self._until(process, lambda: False, seconds)
        ranks = _children(pid) if "processes=2" in self.words else []
        if process.exitcode is not None or (kind == "rank" and not ranks):
            return
        self.counts[{"write": "killed while a checkpoint was written", "twice": "SIGTERM twice"}.get(kind, kind)] += 1
        if kind == "rank":
            _send(self.chance.choice(ranks), signal.SIGKILL)
        elif kind in ("kill", "write"):
            _send(pid, signal.SIGKILL)
        elif kind == "pause":
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for one in (pid, *ranks):
                    _send(one, number)
                time.sleep(0.05)
        else:
            for _ in range(2 if kind == "twice" else 1):
                _send(pid, signal.SIGINT if kind == "SIGINT" else signal.SIGTERM)
                time.sleep(0.01)

    def _until(self, process: ForkServerProcess, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and process.exitcode is None and not condition():
            time.sleep(0.0005)

    def _tear(self) -> None:
        """Spoil the newest checkpoint, or leave what a killed writer leaves."""
        found = checkpoint.candidates(self.checkpoints)
        if not found:
            return
        data = bytearray(found[0].read_bytes())
        kind = self.chance.choice(["truncated", "bit flipped", "left-over"])
        if kind == "truncated":
            found[0].write_bytes(data[: self.chance.randrange(len(data))])
        elif kind == "bit flipped":
            data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
            found[0].write_bytes(data)
        else:
            found[0].with_name(f".{found[0].name}.1.tmp").write_bytes(data[: len(data) // 2])
        self.counts[f"checkpoint {kind}"] += 1


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _children(pid: int) -> list[int]:
    """Return the ranks that a launcher has started: each leads a session of its own."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
        return [child for child in map(int, text.split()) if os.getsid(child) == child]
    except (FileNotFoundError, ProcessLookupError):
        return []


def compare(here: Path, chance: random.Random, counts: Counter[str]) -> list[str]:
    """Train one random configuration undisturbed and under faults, and return what differs, in words."""
    words = random_words(chance)
    began = time.monotonic()
    status = end(start(here / "whole", words))
    if status:
        raise SystemExit(f"exit status {status} without a fault: {' '.join(words)}, see {here / 'whole.txt'}")
    length = time.monotonic() - began
    faults = chance.randint(1, 3 if "processes=2" in words else 8)
    Torture(here / "resumed", words, chance, counts).run(length, faults)
    counts["runs compared"] += 1
    for line in (here / "resumed" / "log.txt").read_text(encoding="utf-8").splitlines():
        counts["resumes"] += " resumed from " in line
        counts["checkpoints found torn"] += "which does not verify" in line
        counts["restarts by the launcher"] += " Restart " in line
    whole, resumed = result(here / "whole"), result(here / "resumed")
    return [f"{name}: {' '.join(words)}" for name in whole if whole[name] != resumed[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of configurations and faults; moments are the machine's")
    parser.add_argument("--runs", type=int, help="at most so many")
    parser.add_argument("--out", type=Path, help="JSON file for the counts")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    chance, counts, differences = random.Random(asked.seed), Counter[str](), []
    began = time.monotonic()
    while (time.monotonic() - began) / 60 < asked.minutes and counts["runs compared"] < (asked.runs or 10**9):
        here = Path(tempfile.mkdtemp(prefix="torture-"))
        found = compare(here, chance, counts)
        differences += found
        if found:
            print(f"DIFFERENT, kept in {here}: {found}", flush=True)
        else:
            shutil.rmtree(here)
        print(f"{(time.monotonic() - began) / 60:5.1f} min  {dict(sorted(counts.items()))}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    summary = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "counts": dict(sorted(counts.items())),
        "differences": differences,
    }
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"{counts['runs compared']} runs compared, {len(differences)} differences")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
