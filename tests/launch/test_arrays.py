"""Batch scripts, without a cluster: bash runs them, with commands of SLURM that write down how they were called."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from largebatch.base.errors import Fault, UserError
from largebatch.config.launchers import SlurmConfig
from largebatch.launch import sbatch as slurm
from largebatch.launch.sbatch import Array, Element

SETTINGS = SlurmConfig(
    name="slurm",
    max_restarts=2,
    timeout=None,
    gpus=None,
    gpus_per_node=8,
    nodes=None,
    cpus_per_gpu=4,
    mem="64G",
    time="04:00:00",
    partition="long",
    account=None,
    qos=None,
    max_concurrent=3,
    signal_seconds=90,
    setup=(),
    options=("--exclusive",),
    dry_run=False,
)
ARRAY = Array(SETTINGS, nodes=2, processes=4, gpus=4, tasks=(0, 2, 3))


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Return a function that puts a command on the PATH which says its words, a line each, into <name>.txt."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def command(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >>{tmp_path}/{name}.txt\n{script}\n')
        path.chmod(0o755)

    return command


def run(directory, tmp_path, array=ARRAY, **environment):
    """Run a batch script as element 2 of job 12 would, and return its exit status."""
    script = tmp_path / "script.sh"
    script.write_text(array.script(directory))
    slurm_says = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "12", "SLURM_JOB_ID": "14"}
    slurm_says |= {"SLURM_JOB_NODELIST": "n1", **environment}
    return subprocess.run(["bash", script], env={**os.environ, **slurm_says}, check=False).returncode


def test_a_script_asks_for_what_its_tasks_need(tmp_path):
    asked = [line for line in ARRAY.script(tmp_path).splitlines() if line.startswith("#SBATCH")]
    assert asked == [
        "#SBATCH --job-name=largebatch",
        "#SBATCH --array=0,2-3%3",
        "#SBATCH --partition=long",
        "#SBATCH --time=04:00:00",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gres=gpu:2",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --mem=64G",
        "#SBATCH --signal=B:USR1@90",
        f"#SBATCH --chdir={Path.cwd()}",
        f"#SBATCH --output={tmp_path}/slurm/%A_%a.log",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --exclusive",
    ]


@pytest.mark.parametrize("name", ["a b", "it's", 'a"b', "$(touch gone)", "`touch gone`", "a\\b;c", "50%", "ä*", "a\nb"])
def test_a_name_is_passed_on_as_it_is(name, tmp_path, commands, monkeypatch):
    """Also one with a line break, which only the options cannot hold: see below."""
    commands("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    commands("program", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "commands" / "program"))
    monkeypatch.setattr(Array, "options", lambda *_: [])
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / name
    assert run(directory, tmp_path) == 0
    assert (tmp_path / "program.txt").read_text() == f"-m\nlargebatch\nsweep\nrun\n{directory}\n2\n"
    assert (directory / "tasks" / "2" / "log.txt").read_text().startswith("── job 12_2 on n1, ")
    assert not (tmp_path / "gone").exists()


def test_an_option_with_a_line_break_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'--partition=a\\nrm -r x' holds a line break"):
        replace(ARRAY, settings=replace(SETTINGS, partition="a\nrm -r x")).script(tmp_path)
    with pytest.raises(UserError, match="holds a line break"):
        ARRAY.script(tmp_path / "a\nb")


def test_ranks_are_told_who_they_are(tmp_path, commands, monkeypatch):
    commands("srun", 'while [[ $1 == --* ]]; do shift; done; SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 exec "$@"')
    commands("program", 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT"')
    monkeypatch.setattr(sys, "executable", str(tmp_path / "commands" / "program"))
    array = replace(ARRAY, settings=replace(SETTINGS, setup=("echo ready",)))
    assert run(tmp_path, tmp_path, array, SLURM_NTASKS_PER_NODE="2") == 0
    host = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    said = (tmp_path / "tasks" / "2" / "log.txt").read_text().splitlines()
    assert said[1:] == ["ready", f"3 1 4 2 {host} 10014"]


@pytest.mark.parametrize(
    ("status", "state", "restarts", "queues"),
    [
        (75, "RUNNING", 0, True),
        (75, "RUNNING", 1, True),
        (75, "RUNNING", 2, False),  # the cap of two is reached
        (75, "COMPLETING", 0, False),  # cancelled
        (0, "RUNNING", 0, False),
        (1, "RUNNING", 0, False),  # a task that fails of itself does so again
        (3, "RUNNING", 0, False),
        (137, "RUNNING", 0, False),
    ],
)
def test_a_task_that_was_asked_to_end_queues_again(status, state, restarts, queues, tmp_path, commands):
    commands("srun", f"exit {status}")
    commands("squeue", f"echo {state}")
    commands("scontrol", "")
    assert run(tmp_path, tmp_path, SLURM_RESTART_COUNT=str(restarts)) == status
    called = tmp_path / "scontrol.txt"
    assert (called.read_text() if called.exists() else "") == ("requeue\n12_2\n" if queues else "")


@pytest.mark.parametrize(("status", "queues"), [(75, True), (138, True), (0, False), (1, False)])
def test_a_notice_is_passed_on_and_waited_for(status, queues, tmp_path, commands):
    """138: SIGUSR1 came before the ranks could heed it."""
    commands("srun", f"trap 'sleep 0.2; exit {status}' USR1; kill -USR1 $PPID; while :; do sleep 0.05; done")
    commands("squeue", "echo RUNNING")
    commands("scontrol", "")
    assert run(tmp_path, tmp_path) == status
    assert (tmp_path / "scontrol.txt").exists() == queues


@pytest.mark.parametrize(
    ("numbers", "text"), [([0], "0"), ([0, 1, 2], "0-2"), ([0, 2, 3, 4, 9, 10], "0,2-4,9-10"), ([], "")]
)
def test_ranges(numbers, text):
    assert slurm.ranges(numbers) == text
    if text:
        assert slurm.numbers(text + "%4") == numbers


def test_an_array_is_split_where_its_numbers_would_be_too_large():
    """MaxArraySize=1001 allows elements 0 to 1000."""
    parts = slurm.split(replace(ARRAY, tasks=(0, 1000, 1001, 1002, 2500)), 1001)
    assert [(part.offset, part.tasks, part.elements) for part in parts] == [
        (0, (0, 1000), "0,1000"),
        (1001, (1001, 1002), "0-1"),
        (2002, (2500,), "498"),
    ]


def test_elements_are_read_from_scontrol():
    """Lines of SLURM 22.05, without what is not read."""
    text = (
        "JobId=13 ArrayJobId=12 ArrayTaskId=0 ArrayTaskThrottle=3 JobName=largebatch UserId=root(0) "
        "JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=1 BatchFlag=1 NodeList=n[1-2] BatchHost=n1\n"
        "JobId=12 ArrayJobId=12 ArrayTaskId=2-3,7%3 ArrayTaskThrottle=3 JobName=largebatch UserId=root(0) "
        "JobState=PENDING Reason=Resources Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 NodeList=(null)\n"
    )
    waiting = {f"12_{n}": Element(f"12_{n}", "PENDING", "Resources", 0, "") for n in (2, 3, 7)}
    found = slurm.parse_scontrol(text)
    assert found == {"12_0": Element("12_0", "RUNNING", "", 1, "n[1-2]"), **waiting}
    assert [(element.queued, element.running) for element in found.values()] == [(False, True), *[(True, False)] * 3]
    cancelled = text.splitlines()[1].replace("2-3,7%3", "4294967294").replace("PENDING", "CANCELLED")
    assert slurm.parse_scontrol(f"{cancelled}\nNo jobs in the system\n") == {}


def test_elements_are_read_from_sacct():
    """An element that queued again has a line for each start."""
    text = (
        "5_0|REQUEUED|n1\n5_1|CANCELLED by 0|n1\n5_0|COMPLETED|n2\n5_2|FAILED|n1\n"
        "5_[3-4%3]|PENDING|None assigned\n6|CANCELLED by 0|None assigned\n"
    )
    assert slurm.parse_sacct(text) == {
        "5_0": Element("5_0", "COMPLETED", "", 1, "n2"),
        "5_1": Element("5_1", "CANCELLED", "", 0, "n1"),
        "5_2": Element("5_2", "FAILED", "", 0, "n1"),
        "5_3": Element("5_3", "PENDING", "", 0, ""),
        "5_4": Element("5_4", "PENDING", "", 0, ""),
    }


def test_without_slurm_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="there is no scontrol on this machine: launcher=slurm takes a cluster's login"):
        slurm.submit(tmp_path, [ARRAY])
    assert slurm.states(tmp_path) == {}  # nothing was submitted: there is nobody to ask


def test_what_was_submitted_stays_known_when_the_next_is_refused(tmp_path, commands):
    commands("scontrol", 'if [[ $2 == config ]]; then echo "MaxArraySize = 1001"; else exit 1; fi')
    commands("sbatch", 'if [[ $2 == */0.sh ]]; then echo "12;cluster"; else echo "sbatch: error: No." >&2; exit 1; fi')
    with pytest.raises(
        UserError, match=r"sbatch failed: No\. The batch script is .*/1\.sh\. Submitted before it: 12\."
    ):
        slurm.submit(tmp_path, [ARRAY, replace(ARRAY, tasks=(1,))])
    assert (tmp_path / "jobs.jsonl").read_text().count('"job": "12", "script": "slurm/0.sh", "tasks": [0, 2, 3]') == 1
    with pytest.raises(Fault, match="scontrol failed"):  # which is not that it has forgotten the job
        slurm.states(tmp_path)
