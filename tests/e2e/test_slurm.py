"""Sweeps on a real SLURM cluster of three nodes, all of them on this machine, that this module starts for itself."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from processes import BIN, last
from safetensors.numpy import load_file

from largebatch.launch import manifest
from largebatch.launch import sbatch as slurm
from largebatch.records.read import read_metrics, read_provenance, read_summary

pytestmark = pytest.mark.slurm
PATIENCE = 300  # seconds before a wait is given up as a hang
SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm-local.sh"
# About five seconds of training, so that a signal finds it in the middle.
WORDS = ("k=2", "n=8", "model=resnet8", "epochs=3", "device=cpu", "threads=1", "log_every=1", "checkpoint.every=7")
WORDS += ("launcher=slurm", "launcher.gpus=1")


def wait_for(condition: Callable[[], object]) -> None:
    """Asking SLURM takes processes, which the runs would miss: ask it seldom, and with patience."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.3)


def needs(*commands: str) -> None:
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [command for command in commands if not shutil.which(command, path=path)]
    if missing:
        pytest.skip(f"there is no {', '.join(missing)} on this machine: scripts/slurm-local.sh install")


@contextlib.contextmanager
def cluster(**settings: str) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as directory, pytest.MonkeyPatch.context() as patch:
        environment = {**os.environ, **settings}
        try:
            subprocess.run([SCRIPT, "start", directory], env=environment, check=True)
            patch.setenv("SLURM_CONF", f"{directory}/etc/slurm.conf")
            yield
        finally:
            subprocess.run([SCRIPT, "stop", directory], env=environment, check=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Path]:
    """Return where commands are run, a directory whose name a shell must not read, beside a cluster."""
    needs("slurmctld", "slurmd", "munged", "sbatch")
    here = tmp_path_factory.mktemp("home") / 'it\'s $(touch gone) "5%"'
    here.mkdir()
    with cluster(NODES="3"):
        yield here


def call(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / "largebatch", *words], cwd=here, capture_output=True, text=True, check=False)


def tell(*words: str) -> str:
    """Call one of SLURM's commands."""
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def processes() -> Iterator[tuple[int, list[str]]]:
    """Yield all processes of this machine, each with its words."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield int(path.parent.name), path.read_text().rstrip("\0").split("\0")


class Sweep:
    """A sweep that was submitted from ``here``."""

    def __init__(self, here: Path, name: str, *words: str) -> None:
        self.here, self.name, self.directory = here, name, here / name
        done = call(here, "train", "-m", f"hydra.sweep.dir={name}", *last(*WORDS, *words))
        assert done.returncode == 0, done.stderr
        assert f"largebatch sweep status {name}" in done.stderr
        self.tasks = manifest.read(self.directory)

    def log(self, task: int) -> str:
        path = manifest.log_of(self.directory, task)
        return path.read_text() if path.exists() else ""

    def element(self, task: int) -> slurm.Element:
        return slurm.states(self.directory)[task]

    def ended(self) -> bool:
        """Whether nothing of it waits or runs at SLURM, which forgets what was cancelled before its first start."""
        return not any(element.queued or element.running for element in slurm.states(self.directory).values())

    def came_to(self, *expected: tuple[str, int]) -> None:
        """Assert what SLURM says of its elements, (state, restarts) each; else show all that is known of them."""
        found = slurm.states(self.directory)
        known = "\n".join(tell("scontrol", "show", "job", found[task].job) + self.log(task) for task in found)
        assert [(element.state, element.restarts) for element in found.values()] == [*expected], known

    def status(self, task: int) -> str:
        return (read_summary(self.tasks[task].directory) or {}).get("status", "")

    def lines(self, task: int) -> int:
        path = self.tasks[task].directory / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def weights(self, task: int) -> dict[str, np.ndarray]:
        assert self.status(task) == "done", self.log(task)
        return load_file(self.tasks[task].directory / "model.safetensors")

    def ranks(self, task: int) -> list[int]:
        """Return the processes that train a task."""
        wanted = ["-m", "largebatch", "sweep", "run", str(self.directory), str(task)]
        return [pid for pid, words in processes() if words[1:] == wanted]

    def stop_in_the_middle(self, task: int) -> list[int]:
        """Wait until a task trains, and stop its processes with SIGSTOP; return them."""
        wait_for(lambda: self.lines(task) > 20 or self.ended())
        ranks = self.ranks(task)
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        assert self.status(task) == "running", self.log(task)
        return ranks


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def has_come(number: signal.Signals, process: int) -> bool:
    """Whether a signal waits for a stopped process."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        name, _, mask = line.partition(":")
        if name in ("SigPnd", "ShdPnd") and int(mask, 16) >> (number - 1) & 1:
            return True
    return False


def go_on_after_notice(ranks: list[int]) -> None:
    """Let stopped processes go on as soon as they have been told to write a checkpoint."""
    wait_for(lambda: all(has_come(signal.SIGUSR1, rank) for rank in ranks))
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)


# What happens to a run in its middle. Each is given the sweep, the number of the task, and its stopped processes.


def undisturbed(sweep: Sweep, task: int, ranks: list[int]) -> None:
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)


def notice(sweep: Sweep, task: int, ranks: list[int]) -> None:
    tell("scancel", "--signal=USR1", "--batch", sweep.element(task).job)
    go_on_after_notice(ranks)


def requeue(sweep: Sweep, task: int, ranks: list[int]) -> None:
    tell("scontrol", "requeue", sweep.element(task).job)  # SIGCONT and SIGTERM


def cancellation(sweep: Sweep, task: int, ranks: list[int]) -> None:
    """Which is not a wish to queue again, but to go on when somebody says so."""
    assert call(sweep.here, "sweep", "cancel", sweep.name).returncode == 0  # SIGCONT and SIGTERM
    wait_for(sweep.ended)
    (found,) = json.loads(call(sweep.here, "sweep", "status", sweep.name, "format=json").stdout)["tasks"]
    assert (found["state"], found["reason"]) == ("interrupted", "CANCELLED")
    assert call(sweep.here, "sweep", "resume", sweep.name).returncode == 0


def preemption(sweep: Sweep, task: int, ranks: list[int]) -> None:
    tell("sbatch", "--partition=main", "--nodelist=n2", "--exclusive", "--output=/dev/null", "--wrap=true")
    go_on_after_notice(ranks)


def death_of_a_node(sweep: Sweep, task: int, ranks: list[int]) -> None:
    """Kill slurmd, then all that it has started; slurmd comes back without them."""
    directory = Path(os.environ["SLURM_CONF"]).parents[1]
    job = re.match(r"JobId=(\d+)", tell("scontrol", "--oneliner", "show", "job", sweep.element(task).job))
    os.kill(int((directory / "run" / "slurmd-n3.pid").read_text()), signal.SIGKILL)
    mine = [pid for pid, words in processes() if words[0].startswith(f"slurmstepd: [{job[1]}.")]
    mine = [pid for pid in mine if str(directory).encode() in Path(f"/proc/{pid}/environ").read_bytes()]
    assert len(mine) == 2  # the script's and the ranks'
    for process in (*mine, *ranks):
        os.kill(process, signal.SIGKILL)
    tell("scontrol", "update", "NodeName=n3", "State=DOWN", "Reason=dead")  # SLURM takes SlurmdTimeout to see it
    wait_for(lambda: sweep.element(task).queued)
    subprocess.run([SCRIPT, "start", directory], check=True)


def time_limit(sweep: Sweep, task: int, ranks: list[int]) -> None:
    """Go on when the time is nearly up: SLURM looks at the clock twice a minute."""
    job = f"JobId={sweep.element(task).job}"
    tell("scontrol", "update", job, "EndTime=now+45")
    go_on_after_notice(ranks)
    wait_for(lambda: sweep.element(task).queued)
    tell("scontrol", "update", job, "TimeLimit=10")


DISTURBANCES = (undisturbed, notice, requeue, cancellation, preemption, death_of_a_node, time_limit)


@pytest.fixture(scope="module")
def disturbed(home) -> dict[str, Sweep]:
    """Run the same experiment under every disturbance, all at once, to the end."""
    places = {preemption: ("low", "n2"), death_of_a_node: ("main", "n3")}

    def begin(disturb: Callable[..., None]) -> tuple[Sweep, list[int]]:
        partition, node = places.get(disturb, ("main", "n1"))
        words = (
            f"launcher.partition={partition}",
            f'launcher.options=["--nodelist={node}"]',
            "launcher.signal_seconds=30",
        )
        sweep = Sweep(home, disturb.__name__, *words)
        return sweep, sweep.stop_in_the_middle(0)

    def end(disturb: Callable[..., None], begun: tuple[Sweep, list[int]]) -> Sweep:
        sweep, ranks = begun
        disturb(sweep, 0, ranks)
        wait_for(sweep.ended)
        return sweep

    # Each is watched by a thread of its own: a run of seconds is over before the last one is submitted, and a time
    # limit does not wait until the other runs were disturbed.
    with ThreadPoolExecutor(len(DISTURBANCES)) as threads:
        begun = list(threads.map(begin, DISTURBANCES))
        sweeps = list(threads.map(end, DISTURBANCES, begun))
    return {disturb.__name__: sweep for disturb, sweep in zip(DISTURBANCES, sweeps, strict=True)}


@pytest.mark.parametrize("name", [disturb.__name__ for disturb in DISTURBANCES])
def test_a_disturbed_run_ends_as_an_undisturbed_one(disturbed, name):
    sweep = disturbed[name]
    sweep.came_to(("COMPLETED", int(name not in ("undisturbed", "cancellation"))))
    assert sweep.log(0).count("── job") == (1 if name == "undisturbed" else 2)
    assert sweep.log(0).count("queues again") == (name in ("notice", "time_limit", "preemption"))
    assert same(sweep.weights(0), disturbed["undisturbed"].weights(0))
    lines = [read_metrics(each.tasks[0].directory, "iteration") for each in (sweep, disturbed["undisturbed"])]
    assert lines[0] == lines[1]


def allotted(sweep: Sweep, task: int) -> tuple[int, int, int]:
    """Return the nodes, the processes, and on a node the GPUs, that a task was given and has seen."""
    environment = read_provenance(sweep.tasks[task].directory)["environment"]
    nodes = tell("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()
    gpus = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return len(nodes), int(environment["WORLD_SIZE"]), len([gpu for gpu in gpus if gpu])


def test_six_of_different_sizes_half_of_them_cancelled_and_resumed(home):
    """exact=true: one process, two on a node and two on two nodes come to the same bits."""
    shapes = ("launcher.gpus=0,1,2", "seed=0,1", 'run_dir="six/g${launcher.gpus}-s${seed}"')
    short = ("exact=true", "epochs=1")
    sweep = Sweep(home, "six", *short, *shapes)
    cancelled = [1, 2, 3]
    tell("scancel", *[sweep.element(task).job for task in cancelled])
    wait_for(sweep.ended)
    assert [sweep.status(task) == "done" for task in range(6)] == [task not in cancelled for task in range(6)]
    first = slurm.states(sweep.directory)

    done = call(home, "sweep", "resume", "six")
    assert done.returncode == 0, done.stderr
    wait_for(sweep.ended)
    now = slurm.states(sweep.directory)
    assert [now[task] == first.get(task) for task in range(6)] == [task not in cancelled for task in range(6)]
    assert [allotted(sweep, task) for task in range(6)] == [(1, 1, 0)] * 2 + [(1, 1, 1)] * 2 + [(1, 2, 2)] * 2
    for seed in (0, 1):
        weights = [sweep.weights(task) for task in range(6) if f"seed={seed}" in sweep.tasks[task].words]
        assert same(weights[0], weights[1])
        assert same(weights[0], weights[2])
    assert not same(sweep.weights(0), sweep.weights(1))

    wide = Sweep(home, "wide", *short, "launcher.gpus=2", "launcher.nodes=2")
    wait_for(wide.ended)
    assert allotted(wide, 0) == (2, 2, 1)
    assert same(wide.weights(0), sweep.weights(0))
    status = call(home, "sweep", "status", "six").stdout.splitlines()
    assert [line.split()[:2] for line in status[1:]] == [[str(task), "done"] for task in range(6)]


def test_two_arrays_at_once_on_one_node_and_one_that_fails(home):
    """Their processes find one another, by ports of their own; the element that fails leaves the others alone."""
    on_one_node = ("launcher.gpus=2", 'launcher.options=["--nodelist=n1"]')
    sweeps = [
        Sweep(home, "left", *on_one_node, "dataset=digits,imagefolder"),
        Sweep(home, "right", *on_one_node, "seed=1"),
    ]
    stopped = [rank for sweep in sweeps for rank in sweep.stop_in_the_middle(0)]
    assert len(stopped) == 4
    for rank in stopped:
        os.kill(rank, signal.SIGCONT)
    for sweep in sweeps:
        wait_for(sweep.ended)
    assert not same(sweeps[0].weights(0), sweeps[1].weights(0))
    sweeps[0].came_to(("COMPLETED", 0), ("FAILED", 0))
    sweeps[1].came_to(("COMPLETED", 0))
    (_, failed) = json.loads(call(home, "sweep", "status", "left", "format=json").stdout)["tasks"]
    assert (failed["state"], "dataset.root" in failed["reason"]) == ("failed", True)
    assert sweeps[0].log(1).count("largebatch: ") == 1


def test_what_waits_is_seen_and_cancelled(home):
    sweep = Sweep(home, "held", "launcher.options=[--hold]", "seed=0,1")
    line = call(home, "sweep", "status", "held").stdout.splitlines()[1]
    assert re.match(r"0 +queued .*JobHeld", line)
    again = call(home, "train", "-m", "hydra.sweep.dir=held", *WORDS, "launcher.options=[--hold]", "seed=0,1")
    assert "2 of 2 tasks are complete or running." in again.stderr
    assert len((sweep.directory / "jobs.jsonl").read_text().splitlines()) == 1
    job = sweep.element(0).job.partition("_")[0]
    assert call(home, "sweep", "cancel", "held").stderr == f"Cancelled: {job}_0, {job}_1.\n"
    assert not any(element.queued or element.running for element in slurm.states(sweep.directory).values())
    assert call(home, "sweep", "cancel", "held").stderr == "Nothing of held waits or runs.\n"


def test_what_the_cluster_refuses_is_a_sentence(home):
    refused = call(home, "train", "launcher=slurm", "launcher.partition=fast", "hydra.sweep.dir=refused")
    assert refused.returncode == 2
    assert "invalid partition specified: fast" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_dry_run_submits_nothing(home):
    jobs = ("squeue", "--noheader", "--format=%i")
    before = tell(*jobs)
    shown = call(home, "train", "launcher=slurm", "launcher.dry_run=true", "hydra.sweep.dir=dry")
    assert (shown.returncode, shown.stdout.count("#SBATCH --array=0\n")) == (0, 1)
    assert tell(*jobs) == before
    assert "sbatch " in shown.stderr
    script = home / "dry" / "slurm" / "dry-run-0.sh"
    assert script.read_text() == shown.stdout
    assert (home / "dry" / "manifest.jsonl").exists()


def test_what_slurm_has_forgotten_is_asked_of_sacct(tmp_path, monkeypatch, compose):
    """Elements that do nothing but succeed or fail."""
    needs("slurmctld", "slurmd", "munged", "sbatch", "slurmdbd", "mariadbd")
    settings = compose("launcher=slurm").launcher
    with cluster(ACCOUNTING="1"):
        for task, program in enumerate(("/bin/true", "/bin/false")):
            monkeypatch.setattr(sys, "executable", program)
            slurm.submit(tmp_path, [slurm.Array(settings, 1, 1, 1, (task,))])
        ended = [slurm.Element("1_0", "COMPLETED", "", 0, "n1"), slurm.Element("2_1", "FAILED", "", 0, "n1")]
        wait_for(lambda: [element.state for element in slurm.states(tmp_path).values()] == ["COMPLETED", "FAILED"])
        monkeypatch.setattr(slurm, "parse_scontrol", lambda text: {})  # as if it knew of none
        wait_for(lambda: list(slurm.states(tmp_path).values()) == ended)  # accounts are written some time later
