"""The words of ``largebatch sweep``, without a run."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from largebatch.base.errors import UserError
from largebatch.cli.commands.sweep import VERBS
from largebatch.cli.main import main, run
from largebatch.launch.manifest import Arm, log_of, plan
from largebatch.launch.status import read_outcome
from largebatch.launch.sweep import _outcome_of_process, put_away, run_task, without_repeats
from largebatch.records.write import write_summary
from largebatch.runtime.lock import Holder

SWEEP = Path("sweep")


@pytest.fixture
def tasks(compose, tmp_path, monkeypatch):
    """Two tasks that nothing has started, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return plan(SWEEP, [Arm(f"k={k}", compose(f"k={k}").to_mapping()) for k in (1, 2)])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "stat sweep",
            "'sweep stat' is not known: sweep takes status, resume, cancel, logs, run. Did you mean 'status'?",
        ),
        ("status", "sweep status takes DIR [watch=true] [format=json]: give the sweep's directory first."),
        ("status watch=true", "sweep status takes DIR [watch=true] [format=json]: give the sweep's directory first."),
        ("status sweep wach=true", "'wach' is not a key of sweep status DIR: … Did you mean 'watch'?"),
        ("status sweep format=jsn", "format=jsn is not known: it takes text, json. Did you mean 'json'?"),
        ("status sweep watch=true format=json", "watch=true is for people, and format=json for programs: take one …"),
        ("status nowhere", "there is no directory nowhere: give a sweep's, … Sweeps there: sweep."),
        ("resume .", ". holds no manifest.jsonl, so it is no sweep. Sweeps there: sweep."),
        ("cancel nowhere", "there is no directory nowhere: …"),
        ("logs sweep", "sweep logs takes DIR TASK. See `largebatch sweep logs --help`."),
        ("logs sweep 2", "TASK 2 is not one of sweep: it takes a whole number from 0 to 1."),
        ("run sweep 1e0", "TASK 1e0 is not one of sweep: it takes a whole number from 0 to 1."),
        ("run sweep 0 1", "sweep run takes DIR TASK. '1' is one argument too many. …"),
        ("resume sweep jobs=2", "sweep resume takes DIR. 'jobs=2' is one argument too many. …"),
    ],
)
def test_a_mistake_is_a_sentence_and_starts_nothing(tasks, words, sentence):
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError) as error:
        run(["sweep", *words.split()])
    beginning, _, end = sentence.partition("…")
    assert str(error.value).startswith(beginning)
    assert str(error.value).endswith(end)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_word(capsys, verb):
    assert run(["sweep", verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"sweep {verb} DIR" in said
    assert run(["sweep"]) == 0
    assert f"sweep {verb} {VERBS[verb].takes}  " in capsys.readouterr().out


def test_status_as_a_table_and_as_json(tasks, capsys):
    assert run(["sweep", "status", "sweep"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["0", "waiting"],
        ["1", "waiting"],
    ]
    assert run(["sweep", "status", "sweep", "format=json"]) == 0
    facts = json.loads(capsys.readouterr().out)["tasks"]
    assert [(task["words"], task["state"], task["epochs"]) for task in facts] == [
        ("k=1", "waiting", 90),
        ("k=2", "waiting", 90),
    ]


def test_a_watch_ends_where_nothing_will_happen_by_itself(tasks, capsys):
    assert run(["sweep", "status", "sweep", "watch=true"]) == 0
    assert "waiting" in capsys.readouterr().out


def test_cancelling_what_does_not_run(tasks, capsys):
    assert run(["sweep", "cancel", "sweep"]) == 0
    assert capsys.readouterr().err == "Nothing of sweep runs.\n"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (PermissionError, 2, "sweep is being run by another user, in process 7: ask them."),
        (ProcessLookupError, 0, "The tasks will write checkpoints and stop."),  # it has ended by itself meanwhile
    ],
)
def test_cancelling_what_cannot_be_signalled(tasks, monkeypatch, capsys, error, status, words):
    def refuse(process, number):
        raise error

    monkeypatch.setattr("largebatch.cli.commands.sweep.holder", lambda _: Holder(socket.gethostname(), 7))
    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(sys, "argv", ["largebatch", "sweep", "cancel", "sweep"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status
    assert words in capsys.readouterr().err


def test_logs_are_named_and_their_last_lines_shown(tasks, capsys):
    assert run(["sweep", "logs", "sweep", "1"]) == 0
    assert capsys.readouterr().out == "Task 1 of sweep has not printed anything: waiting.\n"
    log_of(SWEEP, 1).write_text("".join(f"line {number}\n" for number in range(100)))
    assert run(["sweep", "logs", "sweep", "1"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert (first, last) == ("sweep/tasks/1/log.txt", "line 99")


def test_a_record_that_is_made_again_is_moved_and_not_lost(tasks, capsys):
    for turn in ("first", "second"):
        tasks[0].directory.mkdir()
        write_summary(tasks[0].directory, {"status": turn})
        put_away(SWEEP, tasks[0])
        assert not tasks[0].directory.exists()
    kept = sorted(SWEEP.glob("replaced/*/*/summary.json"))
    assert [json.loads(path.read_text())["status"] for path in kept] == ["first", "second"]
    assert f"was moved to {kept[1].parent}." in capsys.readouterr().err
    put_away(SWEEP, tasks[0])  # there is nothing
    assert len(sorted(SWEEP.glob("replaced/*/*"))) == 2


def test_arms_of_equal_rates_are_one_run(compose, capsys):
    """At k=1 and k=8 the reference rate is not above lr.base; at k=44 an epoch is one iteration."""
    words = ["k=1 warmup=none", "k=1 warmup=gradual", "k=44 warmup=none", "k=44 warmup=constant warmup.epochs=0.4"]
    words += ["k=44 warmup=gradual warmup.epochs=3", "k=1 warmup=gradual seed=1", "k=1 warmup=gradual pitfall=sync_bn"]
    words += ["k=1 warmup=constant run_dir=apart"]
    arms = [Arm(text, compose(*text.split()).to_mapping()) for text in words]
    kept = [arm.words for arm in without_repeats(arms)]
    assert kept == [text for number, text in enumerate(words) if number not in (1, 3)]
    assert capsys.readouterr().err.splitlines() == [
        f"'{words[one]}' is the run of '{words[one - 1]}': the rate is the same at every iteration. It is trained once."
        for one in (1, 3)
    ]


def test_how_a_task_ended_is_left_in_the_sweep(tasks, monkeypatch):
    def refuse(config):
        assert read_outcome(SWEEP, 0) == {"state": "running", "reason": ""}
        raise UserError("no such thing here.\nmore")

    monkeypatch.setattr("largebatch.launch.sweep.train_run", refuse)
    with pytest.raises(UserError, match="no such thing here"):
        run_task(SWEEP, tasks[0])
    assert read_outcome(SWEEP, 0) == {"state": "failed", "reason": "no such thing here."}


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_task_that_a_signal_ended_before_it_could_heed_it_is_interrupted(tasks, number, status):
    assert _outcome_of_process(SWEEP, tasks[0], -signal.Signals[number]).status == status
    assert read_outcome(SWEEP, 0) == {"state": "interrupted", "reason": ""}


def test_a_rank_that_is_not_the_first_leaves_no_word(tasks, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("largebatch.launch.sweep.train_run", lambda config: config.k)
    assert run_task(SWEEP, tasks[1]) == 2
    assert read_outcome(SWEEP, 1) is None


@pytest.mark.parametrize(("signal", "status"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_before_training_begins_is_an_interruption(tasks, signal, status):
    program = (
        "import os, signal, sys, largebatch.launch.sweep as r\n"
        f"r.train_run = lambda config: os.kill(os.getpid(), signal.{signal}) or signal.pause()\n"
        "from largebatch.cli.main import main; sys.argv = ['largebatch', 'sweep', 'run', 'sweep', '0']; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "RANK": "0"}, check=False)
    assert done.returncode == status
    assert read_outcome(SWEEP, 0) == {"state": "interrupted", "reason": ""}
