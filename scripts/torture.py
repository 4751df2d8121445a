"""Kill runs, stop them, tear their checkpoints, and see that what is resumed is what was never interrupted.

    .venv/bin/python scripts/torture.py --minutes 10 --out results/reliability/torture.json

Random configurations of a small run are trained to the end once, and once under faults: SIGKILL at random moments and
in the middle of a checkpoint's write, SIGTERM, SIGINT, a pause by SIGSTOP, a rank killed under its launcher, files
truncated, bits flipped, a writer's left-overs. A connection is dropped (SIGHUP, also where nohup ignores it), a
terminal is closed, the reader of a pipe goes away. In some runs the last step destroys the weights: they must end as
diverged, with status 3 and no best checkpoint. Every process is real. Weights must have the same bytes and records the
same lines (but for times), and a run that ends with status 75 or 130 must have a checkpoint. Exit status 1 if anything
differs.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import multiprocessing
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Outside:
    """Take what a process prints: a file, or a pipe or a terminal, whose other end is closed after a while.

    Attributes:
        output: file, pipe or terminal.
        seconds: Until the other end is closed.
        nohup: Whether SIGHUP is ignored from the start.
    """

    output: str = "file"
    seconds: float = 0.0
    nohup: bool = False

    def open(self, log: Path) -> int:
        """Return a descriptor to print to."""
        if self.output == "file":
            return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        reader, writer = os.pipe() if self.output == "pipe" else pty.openpty()
        if self.output == "terminal":
            fcntl.ioctl(writer, termios.TIOCSCTTY, 0)  # closing it sends SIGHUP to the session's leader
        threading.Thread(target=self._read, args=(reader, log), daemon=True).start()
        return writer

    def _read(self, reader: int, log: Path) -> None:
        """Copy what is printed, and close this end when the time has come."""
        deadline = time.monotonic() + self.seconds
        with log.open("ab", buffering=0) as file:
            while (left := deadline - time.monotonic()) > 0:
                if select.select([reader], [], [], left)[0]:
                    file.write(os.read(reader, 4096))
        os.close(reader)


def _command(arguments: Sequence[str], output: Path, outside: Outside) -> None:
    """Be the command, in a fresh process of the server's."""
    os.setsid()
    if outside.nohup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log = outside.open(output)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.argv = ["largebatch", *arguments]
    from largebatch.cli.main import main

    main()


def start(directory: Path, words: Sequence[str], outside: Outside | None = None) -> ForkServerProcess:
    """Start ``largebatch train`` on a run directory; what it prints goes to ``<directory>.txt``, as long as it can."""
    output = directory.with_name(f"{directory.name}.txt")
    arguments = ["train", *words, f"run_dir='{directory}'"]
    process = FORKS.Process(target=_command, args=(arguments, output, outside or Outside()))
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


def diverging_words(chance: random.Random) -> list[str]:
    """Return a small run whose last step, which may be its only one, destroys the weights."""
    whole = chance.choice([["k=4", "n=32", "epochs=1"], ["k=2", "n=16", "epochs=3"]])
    rest = [
        "lr.base=4e37",
        "warmup=none",
        "optimizer=sgd",
        "precision=fp32",
        "checkpoint.every=1",
        "deterministic=true",
    ]
    words = [*DATA, *whole, *rest, f"seed={chance.randrange(1000)}", "lr.base_minibatch=16", "device=cpu", "threads=1"]
    return [*words, "processes=2"] if chance.random() < 0.2 else words


class Torture:
    """One run under faults, and what was done to it; ``expected`` is the exit status of its end."""

    def __init__(
        self, directory: Path, words: Sequence[str], chance: random.Random, counts: Counter[str], expected: int = 0
    ) -> None:
        self.directory, self.words, self.chance, self.counts = directory, [*words, "resume=true"], chance, counts
        self.checkpoints, self.expected, self.problems = directory / "checkpoints", expected, list[str]()

    def run(self, length: float, faults: int) -> None:
        """Let the run live through ``faults`` faults at random moments, then end.

        Args:
            length: Seconds that it takes undisturbed: faults come within it.
            faults: How many.
        """
        while True:
            outside = self._outside(length) if faults > 0 else Outside()
            process, kind = start(self.directory, self.words, outside), ""
            if faults > 0:
                faults -= 1
                kind = (
                    "" if outside.output != "file" else self._strike(process, self.chance.uniform(0, length), outside)
                )
            status = end(process)
            if status == self.expected:
                return
            ended = (75, -signal.SIGHUP) if outside.output == "terminal" and not outside.nohup else ()
            if outside.output == "pipe" or (outside.output == "terminal" and status not in ended) or kind == "nohup":
                self.problems.append(f"status {status} under {outside}")
            if status not in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, 75, 130):
                raise SystemExit(f"exit status {status}: see {self.directory}.txt")
            begun = (read_summary(self.directory) or {}).get("iterations", 0) > 0
            if status in (75, 130) and begun and not checkpoint.candidates(self.checkpoints):
                self.problems.append(f"status {status} without a checkpoint")
            if self.chance.random() < 0.4:
                self._tear()

    def _outside(self, length: float) -> Outside:
        """Choose where the next start prints; mostly to a file, which stays."""
        output = self.chance.choice(["file", "file", "pipe", "terminal"])
        nohup = self.chance.random() < 0.5
        if output != "file":
            name = {"pipe": "reader of a pipe gone", "terminal": "terminal closed"}[output]
            self.counts[name + " under nohup" * (nohup and output == "terminal")] += 1
        return Outside(output, self.chance.uniform(0, length), nohup)

    def _strike(self, process: ForkServerProcess, seconds: float, outside: Outside) -> str:
        """Do something to a process at some moment, and return what; empty where it had ended."""
        kinds = ["kill", "kill", "write", "write", "SIGTERM", "SIGINT", "twice", "pause"]
        kinds += ["nohup" if outside.nohup else "SIGHUP"] * 3
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
            return ""
        names = {"write": "killed while a checkpoint was written", "twice": "SIGTERM twice", "nohup": "SIGHUP ignored"}
        self.counts[names.get(kind, kind)] += 1
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
            number = {"SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP, "nohup": signal.SIGHUP}.get(
                kind, signal.SIGTERM
            )
            for _ in range(2 if kind == "twice" else 1):
                _send(pid, number)
                time.sleep(0.01)
        return kind

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
    diverges = chance.random() < 0.2
    words, expected = (diverging_words(chance), 3) if diverges else (random_words(chance), 0)
    began = time.monotonic()
    status = end(start(here / "whole", words))
    if status != expected:
        raise SystemExit(f"exit status {status} without a fault: {' '.join(words)}, see {here / 'whole.txt'}")
    length = time.monotonic() - began
    faults = chance.randint(1, 3 if "processes=2" in words else 8)
    torture = Torture(here / "resumed", words, chance, counts, expected)
    torture.run(length, faults)
    counts["runs compared"] += 1
    counts["runs whose last step diverges"] += diverges
    for line in (here / "resumed" / "log.txt").read_text(encoding="utf-8").splitlines():
        counts["resumes"] += " resumed from " in line
        counts["checkpoints found torn"] += "which does not verify" in line
        counts["restarts by the launcher"] += " Restart " in line
    whole, resumed = result(here / "whole"), result(here / "resumed")
    found = [*torture.problems, *(name for name in whole if whole[name] != resumed[name])]
    for run, summary in ((here / "whole", whole["summary"]), (here / "resumed", resumed["summary"])):
        best = any((run / "checkpoints").glob(f"{checkpoint.BEST}*"))
        if diverges and (best or summary["status"] != "diverged"):
            found.append(f"{run.name} is {summary['status']}{', with a best checkpoint' * best}")
    return [f"{one}: {' '.join(words)}" for one in found]


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
