"""Groups that something else has started, folders of photographs from end to end, runs side by side, and sweeps."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from images import make_tree
from processes import last
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
PATIENCE = 300
SAME = ("k=2", "n=8", "device=cpu", "precision=fp64", "threads=1", "iterations=3", "epochs=1", "lr.base_minibatch=8")


def start(here: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [BIN / command[0], *command[1:]], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    printed, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, printed


def torchrun(*arguments: str) -> tuple[str, ...]:
    return ("torchrun", "--standalone", "--nproc_per_node=2", "-m", "largebatch", *arguments)


def distance(one: Path, other: Path) -> float:
    """Return the largest ‖a − b‖ / max(‖a‖, 10⁻³ × the norm of everything) over the tensors of two runs."""
    a, b = (load_file(run / "model.safetensors") for run in (one, other))
    whole = torch.cat([tensor.double().flatten() for tensor in a.values()]).norm()
    assert a.keys() == b.keys()
    return max(((a[key] - b[key]).double().norm() / max(a[key].double().norm(), 1e-3 * whole)).item() for key in a)


def test_torchrun_and_runs_side_by_side_give_the_same_weights(tmp_path):
    """Two runs at a time on one machine: neither clashes on a port."""
    together = [
        start(tmp_path, "largebatch", "train", *SAME, "processes=2", "run_dir=two"),
        start(tmp_path, *torchrun("train", *SAME, "run_dir=joined")),
        start(tmp_path, "largebatch", "train", *SAME, "processes=1", "run_dir=one"),
    ]
    for process in together:
        status, printed = end(process)
        assert status == 0, printed
    for run in ("two", "joined"):
        assert distance(tmp_path / "one", tmp_path / run) < 1e-10
        assert sorted(path.name for path in (tmp_path / run / "logs").iterdir()) == ["rank1.log"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joined", "one", "two"]


def test_mistakes_under_torchrun_are_said_once(tmp_path):
    together = [
        start(tmp_path, *torchrun("train", *last(*SAME, "k=3"))),
        start(tmp_path, *torchrun("train", "-m", *SAME, "seed=0,1")),
        start(tmp_path, *torchrun("train", *SAME, "dataset=imagefolder", "dataset.root=nowhere")),
    ]
    words = (
        "2 processes were started (WORLD_SIZE), which does not divide k=3",
        "a sweep (-m, launcher=slurm) cannot be started in a rank",
        "nowhere does not exist",
    )
    for process, text in zip(together, words, strict=True):
        status, printed = end(process)
        assert status != 0
        assert printed.count(text) == 1, printed
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("late", ["0", "1", "claimed"])
def test_a_mistake_is_said_once_whichever_rank_ends_first(tmp_path, late):
    """One rank never comes to its end by itself, or the one that gives the reason takes long to write it."""
    program = tmp_path / "late.py"
    program.write_text(
        "import os, time\n"
        "from largebatch.cli.main import main\n"
        "from largebatch.runtime import failure\n"
        f"if os.environ['RANK'] == '{late}':\n"
        f"    time.sleep({PATIENCE})\n"
        "first = failure._is_first_on_machine\n"
        f"if '{late}' == 'claimed':\n"
        "    failure._is_first_on_machine = lambda file: first(file) and not time.sleep(3)\n"
        "main()\n"
    )
    here = tmp_path / "here"
    here.mkdir()
    command = ("torchrun", "--standalone", "--nproc_per_node=2", str(program), "train", "k=3")
    status, printed = end(start(here, *command))
    assert status != 0
    assert printed.count("2 processes were started (WORLD_SIZE), which does not divide k=3") == 1, printed


def test_ranks_with_other_data_are_refused_before_the_first_step(tmp_path):
    """Two machines whose folders have the same number of images and of classes."""
    for name, word in (("one", "coffee"), ("two", "tea")):
        tree = make_tree(tmp_path / name, train=2, val=1)
        for split in ("train", "val"):
            (tree / split / "coffee").rename(tree / split / word)
    program = tmp_path / "other.py"
    program.write_text(
        "import os\n"
        "from largebatch.cli.main import main\n"
        f"os.environ['LARGEBATCH_DATA'] = os.path.join({str(tmp_path)!r}, ['one', 'two'][int(os.environ['RANK'])])\n"
        "main()\n"
    )
    here = tmp_path / "here"
    here.mkdir()
    words = ("dataset=imagefolder", "dataset.height=32", "dataset.width=32", "dataset.resize=32", "model=resnet8")
    words += ("k=2", "n=2", "epochs=1", "device=cpu", "threads=1", "loader.workers=0")
    command = ("torchrun", "--standalone", "--nproc_per_node=2", str(program), "train", *words, "run_dir=run")
    status, printed = end(start(here, *command))
    assert status != 0
    sentence = "rank 1 does not train what rank 0 trains: its data differ: class 2 is 'motorcycle_left' there"
    assert printed.count(sentence) == 1, printed
    assert not (here / "run").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_fault_of_one_rank_in_the_middle_of_a_run_is_said_once(tmp_path, rank):
    program = tmp_path / "faulty.py"
    program.write_text(
        "import os\n"
        "from largebatch.base.errors import UserError\n"
        "from largebatch.cli.main import main\n"
        "from largebatch.training import step\n"
        "sound = step.train_step\n"
        "def faulty(learner, batches, iteration):\n"
        f"    if iteration == 1 and os.environ['RANK'] == '{rank}':\n"
        "        raise UserError('image 7 ' + 'is damaged')\n"
        "    return sound(learner, batches, iteration)\n"
        "step.train_step = faulty\n"
        "main()\n"
    )
    here = tmp_path / "here"
    here.mkdir()
    command = ("torchrun", "--standalone", "--nproc_per_node=2", str(program), "train", *SAME, "run_dir=run")
    status, printed = end(start(here, *command))
    assert status != 0
    assert printed.count("image 7 is damaged") == 1, printed


@pytest.fixture
def hosts() -> Iterator[tuple[list[str], list[str], str]]:
    """Return what makes a command run on each of two hosts, and the first one's address.

    Two network namespaces joined by a cable where this user may make them, else this machine twice.
    """

    def ip(*arguments: str) -> bool:
        return subprocess.run(["ip", *arguments], check=False, capture_output=True).returncode == 0

    names = [f"largebatch{os.getpid()}{side}" for side in "ab"]
    if not (shutil.which("ip") and ip("netns", "add", names[0])):
        yield [], [], "127.0.0.1"
        return
    try:
        ends = [f"lb{os.getpid()}{side}" for side in "ab"]
        made = ip("netns", "add", names[1]) and ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, cable, address in zip(names, ends, ("10.99.0.1/24", "10.99.0.2/24"), strict=True):
            made = made and ip("link", "set", cable, "netns", name)
            made = made and ip("-n", name, "address", "add", address, "dev", cable)
            made = made and ip("-n", name, "link", "set", cable, "up") and ip("-n", name, "link", "set", "lo", "up")
        if made:
            first, second = (["ip", "netns", "exec", name] for name in names)
            yield first, second, "10.99.0.1"
        else:
            yield [], [], "127.0.0.1"
    finally:
        for name in names:
            ip("netns", "delete", name)


def test_two_hosts_train_as_one(tmp_path, hosts):
    first, second, address = hosts
    arguments = ("-m", "largebatch", "train", *SAME, "run_dir=run")
    agents = []
    for number, prefix in enumerate((first, second)):
        rendezvous = f"--nnodes=2 --node_rank={number} --nproc_per_node=1 --master_addr={address} --master_port=29871"
        environment = {**os.environ}
        if prefix:
            cable = f"lb{os.getpid()}{'ab'[number]}"
            environment |= {"GLOO_SOCKET_IFNAME": cable}
        agents.append(
            subprocess.Popen(
                [*prefix, BIN / "torchrun", *rendezvous.split(), *arguments],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    alone = start(tmp_path, "largebatch", "train", *SAME, "run_dir=alone")
    for process in (*agents, alone):
        status, printed = end(process)
        assert status == 0, printed
    assert distance(tmp_path / "alone", tmp_path / "run") < 1e-10
    placement = json.loads((tmp_path / "run" / "provenance.json").read_text())["placement"]
    assert placement["processes"] == 2


def test_photographs_train_a_resnet50(largebatch, tmp_path):
    """Greyscale, CMYK and a PNG named .JPEG among them; loader processes make no difference."""
    root = make_tree(tmp_path / "tree", train=3, val=1)
    common = ("model=resnet50", "dataset=imagefolder", f"dataset.root={root}", "k=2", "n=2", "device=cpu")
    done = largebatch("train", *common, "iterations=2", "epochs=1", "run_dir=full", "loader.workers=1")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "full" / "summary.json").read_text())
    assert (summary["status"], summary["iterations"], summary["train_images"], summary["val_images"]) == (
        "stopped",
        2,
        12,
        4,
    )
    small = ("dataset.height=64", "dataset.width=64", "dataset.resize=72", "epochs=1", "threads=1")
    for workers in (0, 2):
        done = largebatch("train", *common, *small, f"loader.workers={workers}", f"run_dir=small{workers}")
        assert done.returncode == 0, done.stderr
    weights = [(tmp_path / f"small{workers}" / "model.safetensors").read_bytes() for workers in (0, 2)]
    assert weights[0] == weights[1]


def test_a_sweep_goes_on_after_a_diverged_and_a_failing_arm(largebatch, tmp_path):
    base = ("-m", "k=2", "device=cpu", "threads=1", "epochs=1", "warmup=none")
    # Only a run that starts can know that sync_bn does not go with the processes that it was given.
    done = largebatch("train", *base, "n=8", "pitfall=none,sync_bn", "lr.base=0.1,1e30", "processes=2")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr  # of the diverged arm, a result that its two processes return
    table = done.stderr.rpartition("\n\n")[2].splitlines()
    assert re.split(r"\s{2,}", table[0].strip()) == ["run", "status", "iterations", "final error %"]
    assert [re.split(r"\s{2,}", row)[1] for row in table[1:]] == ["done", "diverged", "failed", "failed"]
    assert done.stderr.count("pitfall=sync_bn computes all kn samples in one pass") == 2
    (sweep,) = (tmp_path / "runs" / "sweeps").iterdir()
    statuses = [json.loads(path.read_text())["status"] for path in sweep.glob("*/summary.json")]
    assert sorted(statuses) == ["diverged", "done"]

    assert largebatch("train", *base, "n=8", "lr.base=0.1,1e30", "iterations=3").returncode == 0
