"""Runs of several processes, and how they end: real processes, real signals."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from images import make_tree, spoil
from processes import ENDLESS, SMALL, alive, descendants, linux, ranks, wait_for

pytestmark = pytest.mark.slow


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


def listening(process: int) -> set[str]:
    """Return the addresses at which a process listens, as /proc/net writes them."""
    links = [str(path.readlink()) for path in Path(f"/proc/{process}/fd").iterdir() if path.is_symlink()]
    own = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and row[9] in own}


@linux
def test_processes_of_one_machine_meet_where_no_other_can_reach(start):
    run = start(*ENDLESS, "processes=2")
    run.until_it_trains()
    addresses = set().union(*map(listening, [run.process.pid, *descendants(run.process.pid)]))
    assert addresses == {"0100007F"}  # 127.0.0.1, in the order of this machine's bytes


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
    run = start(*ENDLESS, "processes=2", "launcher.max_restarts=0")
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
