"""Processes, started for real: what they return, how they fail, and that none is left behind."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from largebatch.base.errors import Fault, UserError
from largebatch.runtime.processes import RankError, RankLost, Stopped, explained, launch
from largebatch.runtime.watchdog import Hang


def act(scenario, here):
    """Be a rank of two, in a group that feels it when a rank is gone."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    (here / f"pid{rank}").write_text(str(os.getpid()))
    if scenario == "bug" and rank == 1:
        raise KeyError("a bug of ours")
    total = torch.full((1,), float(rank + 1))
    dist.all_reduce(total)  # fails in the rank that is left
    return scenario, rank, torch.get_num_threads(), total.item()


def test_rank_0_returns_what_it_found(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert launch(act, ("return", tmp_path), 2, 1) == ("return", 0, 1, 3.0)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def notify(here):
    """Be a rank whose launcher is given a scheduler's notice before the ranks could heed it."""
    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getppid(), signal.SIGUSR1)
    signal.pause()


@pytest.mark.slow
def test_a_notice_that_ends_the_ranks_is_no_loss_of_one(tmp_path):
    """Else they would be started again, and the notice forgotten."""
    with pytest.raises(Stopped, match=r"^stopped by SIGUSR1$"):
        launch(notify, (tmp_path,), 2, 1)


def test_one_process_is_this_one():
    assert launch(os.getpid, (), 1, 1) == os.getpid()


def test_the_rank_that_failed_of_itself_is_named_with_its_traceback(tmp_path, capfd):
    words = r"(?s)^rank 1 of 2 failed with exit status 1:\nTraceback .*\nKeyError: 'a bug of ours'$"
    with pytest.raises(RankError, match=words) as caught:
        launch(act, ("bug", tmp_path), 2, 1)
    assert str(caught.value).count("Traceback") == 1
    assert capfd.readouterr() == ("", "")
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (UserError("k=3 is odd: take k=4."), UserError, "k=3 is odd: take k=4."),
        (Fault("a loader process is gone."), RankError, "rank 1 of 2: a loader process is gone."),
        (Hang("no progress: rank 0 is still training."), RankLost, "no progress: rank 0 is still training."),
    ],
)
def test_what_a_rank_says_in_a_sentence_stays_one(raised, kind, words, tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def fail():
        raise raised

    with pytest.raises(type(raised)):
        record(fail)()
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    found = explained(ChildFailedError("fit", {1: failure}), processes=2)
    assert (type(found), str(found)) == (kind, words)
