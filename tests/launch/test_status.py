"""Where tasks stand, from what their runs, their owners and a scheduler have left behind."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from largebatch.base.errors import UserError
from largebatch.launch.manifest import Task, log_of, plan
from largebatch.launch.status import WITHOUT_A_WORD, Standing, as_table, distinct, over, standings, write_outcome
from largebatch.records.write import write_summary

SWEEP = Path("sweep")


OWN = """
import sys
from pathlib import Path
from largebatch.runtime.lock import owned
with owned(Path(sys.argv[1])):
    print(flush=True)
    input()
"""


@dataclass(frozen=True)
class Element:
    state: str
    reason: str = ""
    restarts: int = 0

    @property
    def queued(self) -> bool:
        return self.state == "PENDING"

    @property
    def running(self) -> bool:
        return self.state == "RUNNING"


@pytest.fixture
def task(arm):
    (planned,) = plan(SWEEP, [arm("k=2", "epochs=4")])
    return planned


def record(task: Task, status: str, *lines: dict, hash: str | None = None, **summary: object) -> None:
    task.directory.mkdir()
    origin = {"run_hash": hash or task.config.run_hash("fp32"), "experiment": {"precision": "fp32"}}
    (task.directory / "provenance.json").write_text(json.dumps(origin))
    (task.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_summary(task.directory, {"status": status, **summary})


def standing(task: Task, at: Element | None = None) -> Standing:
    (found,) = standings(SWEEP, [task], {task.number: at} if at else {})
    return found


def test_a_task_that_nothing_has_started_waits(task):
    assert (standing(task).state, standing(task).missing) == ("waiting", True)
    queued = standing(task, at=Element("PENDING", "Priority", restarts=2))
    assert (queued.state, queued.reason, queued.restarts, queued.missing) == ("queued", "Priority", 2, False)


@pytest.mark.parametrize("status", ["done", "diverged"])
def test_a_result_is_a_result(task, status):
    record(task, status, {"kind": "epoch", "epoch": 4, "val_error": 9.0}, final_error=2.5)
    found = standing(task, at=Element("COMPLETED"))
    assert (found.state, found.error, found.epoch, found.missing) == (status, 2.5, 4, False)


def test_a_run_that_stopped_early_is_over_until_more_is_asked_for(task, arm):
    record(task, "stopped", iterations=10)
    write_outcome(SWEEP, task.number, "over")
    assert standing(task).state == "waiting"
    for asked, state in ((11, "waiting"), (10, "stopped")):
        (again,) = plan(SWEEP, [arm("k=2", "epochs=4", f"iterations={asked}")])
        assert (again.number, standing(again).state) == (task.number, state)


def test_the_result_of_another_run_is_none(task):
    record(task, "done", hash="0" * 64)
    assert over(task) is None


def test_progress_is_read_from_the_end_of_the_record(task):
    filling = {"kind": "iteration", "epoch": 1.0, "text": "x" * (1 << 16)}
    record(task, "running", {"kind": "epoch", "epoch": 9}, filling, {"kind": "epoch", "epoch": 2, "val_error": 7.5})
    with (task.directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "iteration", "epoch": 2.25}\n{"kind": "iterat')
    assert (standing(task).epoch, standing(task).error) == (2.25, 7.5)


@pytest.mark.parametrize("place", ["the task's", "the run's"])
def test_a_task_whose_owner_lives_is_running_and_one_that_was_killed_has_failed(task, place):
    record(task, "running")
    write_outcome(SWEEP, task.number, "running")
    directory = log_of(SWEEP, task.number).parent if place == "the task's" else task.directory
    owner = subprocess.Popen(
        [sys.executable, "-c", OWN, str(directory.absolute())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdout.readline()
    assert standing(task).state == "running"
    owner.kill()
    owner.communicate()
    assert (standing(task).state, standing(task).reason) == ("failed", WITHOUT_A_WORD)
    assert standing(task, at=Element("NODE_FAIL")).reason == f"{WITHOUT_A_WORD} (NODE_FAIL)"


def test_a_run_that_was_ended_as_hung_says_so_in_its_record_alone(task):
    record(task, "failed", reason="no progress for 600 s: rank 3 of 8 has stopped responding in iteration 7.")
    write_outcome(SWEEP, task.number, "running")
    assert standing(task, at=Element("FAILED", "NonZeroExitCode")).reason.startswith("no progress for 600 s: rank 3")


@pytest.mark.parametrize("text", ["{", "[]", '{"state": "over"}'])
def test_a_damaged_word_is_named(task, text):
    path = log_of(SWEEP, task.number).with_name("outcome.json")
    path.write_text(text)
    with pytest.raises(UserError, match=rf"^{path} cannot be read: take it away"):
        standing(task)


def test_why_it_failed_or_was_interrupted(task):
    record(task, "failed", reason="from the record")
    write_outcome(SWEEP, task.number, "failed")
    assert (standing(task).state, standing(task).reason) == ("failed", "from the record")
    write_outcome(SWEEP, task.number, "failed", "from the task")
    assert standing(task).reason == "from the task"
    write_outcome(SWEEP, task.number, "interrupted")
    found = standing(task, at=Element("CANCELLED"))
    assert (found.state, found.reason, found.missing) == ("interrupted", "CANCELLED", True)
    assert standing(task, at=Element("PENDING", "Resources")).state == "queued"
    assert standing(task, at=Element("RUNNING")).state == "running"


def test_a_task_that_the_scheduler_ended_before_it_began(task):
    found = standing(task, at=Element("CANCELLED", "by 0"))
    assert (found.state, found.reason) == ("failed", "it ended before it began: CANCELLED by 0")


def test_restarts_are_counted_in_the_record(task):
    record(task, "running")
    (task.directory / "starts.jsonl").write_text('{"iteration": 0}\n{"iteration": 7}\n{"iteration": 9}\n')
    assert standing(task).restarts == 2


def test_words_that_all_arms_share_are_left_out():
    assert distinct(["k=1 n=8 seed=0", "k=1 n=8 seed=1"]) == ["seed=0", "seed=1"]
    assert distinct(["k=1 n=8"]) == ["k=1 n=8"]
    assert distinct([]) == []


def test_the_table_has_a_line_a_task(task):
    write_outcome(SWEEP, task.number, "failed", "no more")
    lines = as_table([standing(task)]).splitlines()
    assert [line.split() for line in lines] == [
        ["task", "state", "epoch", "error", "%", "restarts", "run", "reason"],
        ["0", "failed", "0.0", "of", "4", "–", "0", "k=2", "epochs=4", "no", "more"],
    ]
