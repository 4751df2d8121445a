"""Runs of several processes, and how they end: real processes, real signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from images import make_tree, spoil

BIN = Path(sys.executable).parent
PATIENCE = 120  # seconds before a wait is given up as a hang
SMALL = ("k=2", "n=8", "device=cpu", "threads=1")
ENDLESS = (*SMALL, "epochs=1000000", "log_every=1")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(process: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def ranks(launcher: int) -> list[int]:
    """Return the ranks that a launcher has started: each leads a session of its own."""
    return [process for process in descendants(launcher) if os.getsid(process) == process]


class Run:
    """A run on its way, in the run directory ``run``."""

    def __init__(self, here: Path, *arguments: str) -> None:
        self.directory = here / "run"
        self.process = subprocess.Popen(
            [BIN / "largebatch", "train", "run_dir=run", *arguments],
            cwd=here,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def lines(self) -> int:
        metrics = self.directory / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    @property
    def summary(self) -> dict:
        return json.loads((self.directory / "summary.json").read_text())

    def until_it_trains(self, beyond: int = 0) -> None:
        wait_for(lambda: self.lines > beyond or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()[1]

    def end(self) -> tuple[int, str]:
        """Wait for the end, and return exit status and what was printed."""
        _, printed = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, printed


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Run]]:
    runs = []

    def begin(*arguments: str) -> Run:
        runs.append(Run(tmp_path, *arguments))
        return runs[-1]

    yield begin
    for run in runs:
        run.process.kill()  # nothing, where it has ended
        run.process.wait()
        run.process.stderr.close()


@linux
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_a_run_after_an_iteration_and_it_can_go_on(start, processes):
    run = start(*ENDLESS, f"processes={processes}")
    run.until_it_trains()
    everyone = descendants(run.process.pid)
    assert len(ranks(run.process.pid)) == (0 if processes == 1 else 2)
    run.process.send_signal(signal.SIGINT)
    status, printed = run.end()
    assert (status, run.summary["status"], run.summary["signal"]) == (130, "interrupted", "SIGINT")
    assert "interrupted: " in printed
    assert "Traceback" not in printed
    wait_for(lambda: not any(map(alive, everyone)))
    assert run.lines >= run.summary["iterations"] > 0
    assert (run.directory / "logs" / "rank1.log").exists() == (processes == 2)

    done = run.lines
    run = start(*ENDLESS, f"processes={processes}", "resume=true")
    run.until_it_trains(beyond=done)
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 75
    assert (run.summary["status"], run.summary["signal"]) == ("interrupted", "SIGTERM")


@linux
@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_signal_ends_it_at_once(start, processes, tmp_path):
    """An iteration of 2 × 256 photographs at 224 pixels takes a ResNet-101 minutes."""
    run = start(
        *SMALL, f"processes={processes}", "n=256", "model=resnet101", "dataset=synthetic", "checkpoint.minutes=0"
    )
    summary = run.directory / "summary.json"
    wait_for(lambda: summary.exists() or run.process.poll() is not None)
    wait_for(lambda: processes == 1 or (run.directory / "logs" / "rank1.log").exists())
    everyone = descendants(run.process.pid)
    for number in (signal.SIGINT, signal.SIGTERM):
        run.process.send_signal(number)
        time.sleep(1)  # two signals in one moment are one
    assert run.end()[0] in (-signal.SIGTERM, 128 + signal.SIGTERM, 130)
    wait_for(lambda: not any(map(alive, everyone)))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree"))


def photographs(root: Path, *more: str) -> tuple[str, ...]:
    size = ("dataset.height=32", "dataset.width=32", "dataset.resize=32")
    return ("dataset=imagefolder", f"dataset.root={root}", *size, "n=2", "loader.workers=1", *more)


@linux
def test_a_launcher_that_is_killed_leaves_no_orphan(start, tree):
    """Neither ranks nor their loader processes."""
    run = start(*ENDLESS, *photographs(tree), "processes=2")
    run.until_it_trains()
    everyone = descendants(run.process.pid)
    assert len(ranks(run.process.pid)) == 2
    assert len(everyone) >= 4
    run.process.kill()
    run.process.wait()
    wait_for(lambda: not any(map(alive, everyone)))


@linux
def test_a_rank_that_is_killed_is_named(start):
    run = start(*ENDLESS, "processes=2")
    run.until_it_trains()
    everyone = descendants(run.process.pid)
    os.kill(ranks(run.process.pid)[-1], signal.SIGKILL)
    status, printed = run.end()
    assert status == 1
    assert re.search(r"^largebatch: rank [01] of 2 was killed by SIGKILL\.$", printed, re.MULTILINE)
    assert "Traceback" not in printed
    assert run.summary["status"] == "failed"
    assert re.match(r"rank [01] of 2 was killed by SIGKILL", run.summary["reason"])
    wait_for(lambda: not any(map(alive, everyone)))


@linux
def test_a_loader_process_that_is_killed_ends_the_run_in_a_sentence(start, tree):
    run = start(*ENDLESS, *photographs(tree))
    run.until_it_trains()
    loader = descendants(run.process.pid)[-1]
    os.kill(loader, signal.SIGKILL)
    status, printed = run.end()
    assert status == 1
    assert re.search(r"^largebatch: a loader process is gone: DataLoader worker.*loader\.workers", printed, re.M)
    assert "Traceback" not in printed
    assert run.summary["status"] == "failed"


def test_a_corrupt_image_in_one_rank_is_one_sentence(start, tmp_path):
    root = make_tree(tmp_path / "tree")
    bad = spoil(root / "train" / "coffee" / "00000003.JPEG")
    run = start(*SMALL, *photographs(root), "processes=2")
    status, printed = run.end()
    assert status == 2
    assert printed.count("corrupt image") == printed.count(f"corrupt image {bad}") == 1
    assert "Traceback" not in printed
    assert (run.summary["status"], "corrupt image" in run.summary["reason"]) == ("failed", True)

    run = start(*SMALL, *photographs(root), "epochs=1", "run_dir=other", "dataset.on_error=skip")
    assert run.end()[0] == 0
    epoch = json.loads((tmp_path / "other" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (epoch["kind"], epoch["replaced"], epoch["val_unreadable"]) == ("epoch", 1, 0)
