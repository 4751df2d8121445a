import json
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from largebatch.runtime import failure


@pytest.fixture
def as_rank(monkeypatch):
    """Return a function that makes this process one rank of three."""

    def become(rank, **environment):
        for name, value in {"RANK": rank, "WORLD_SIZE": 3, **environment}.items():
            monkeypatch.setenv(name, str(value))

    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    return become


def test_a_process_alone_prints(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    failure.tell("a reason")
    assert capsys.readouterr().err == "a reason\n"


def test_the_first_rank_of_a_machine_writes_torchruns_file_and_the_others_wait(as_rank, tmp_path, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(failure.time, "sleep", waited.append)
    for rank in (2, 0, 1):
        (tmp_path / str(rank)).mkdir()
        as_rank(rank, TORCHELASTIC_ERROR_FILE=tmp_path / str(rank) / "error.json")
        failure.tell("a reason")
    assert [path.parent.name for path in tmp_path.glob("*/error.json")] == ["2"]
    message = json.loads((tmp_path / "2" / "error.json").read_text())["message"]
    assert (message["message"], message["extraInfo"]["py_callstack"]) == ("a reason", "a reason")
    assert waited == [failure.PATIENCE] * 2
    assert capsys.readouterr().err == ""


def test_without_torchrun_rank_0_prints_before_the_ranks_have_met(as_rank, capsys):
    as_rank(0)
    failure.tell("a reason")
    assert capsys.readouterr().err == "a reason\n"


def test_another_rank_relies_on_rank_0_that_hosts_no_store(as_rank, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(failure, "PATIENCE", 0.5)
    as_rank(1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    failure.tell("a reason")
    assert capsys.readouterr().err == ""


def test_the_first_of_the_other_ranks_prints_while_rank_0_is_at_work(as_rank, capsys):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in (2, 1):
        as_rank(rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port)
        failure.tell("a reason")
    assert capsys.readouterr().err == "a reason\n"


def test_a_rank_whose_output_goes_to_a_file_prints_on_the_terminal(tmp_path):
    program = (
        "import os; from largebatch.runtime import failure; failure.keep_terminal(); "
        f"os.dup2(os.open({str(tmp_path / 'log')!r}, os.O_WRONLY | os.O_CREAT), 2); failure.tell('a reason')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "a reason\n"
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.parametrize("speaks", [True, False])
def test_what_all_ranks_have_found_is_printed_by_one(as_rank, capsys, speaks):
    as_rank(1)
    failure.give_up(RuntimeError("a reason"), speaks)
    assert capsys.readouterr().err == "largebatch: a reason\n" * speaks
