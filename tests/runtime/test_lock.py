"""A run directory has one owner: other processes are asked, since a process is never refused by itself."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from largebatch.base.errors import UserError
from largebatch.runtime.lock import NAME, Holder, holder, owned

OWN = """
import sys
from pathlib import Path
from largebatch.runtime.lock import owned
with owned(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""
FORK = """
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
"""


@pytest.fixture
def owner(tmp_path):
    """Return a process that owns ``tmp_path`` until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", OWN, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def test_a_living_owner_is_named_and_refuses_others(owner, tmp_path):
    assert holder(tmp_path) == Holder(socket.gethostname(), owner.pid)
    words = f"run_dir={tmp_path} is in use by process {owner.pid} on {socket.gethostname()}: wait"
    with pytest.raises(UserError, match=words), owned(tmp_path, patience=0.3):
        pass
    assert holder(tmp_path).pid == owner.pid


@pytest.mark.parametrize("number", [signal.SIGKILL, None])
def test_an_owner_that_is_gone_holds_nothing(owner, tmp_path, number):
    if number:
        owner.send_signal(number)
    else:
        owner.stdin.close()
    owner.wait()
    assert holder(tmp_path) is None
    with owned(tmp_path, patience=0):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_child_of_the_owner_does_not_keep_the_lock(tmp_path):
    """As loader processes do that outlive a killed trainer for a moment."""
    program = f"import os, time\n{OWN}".replace("    print", f"{FORK}    print")
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        child = int(process.stdout.readline())
        assert process.stdout.readline() == "mine\n"
        process.kill()
    try:
        os.kill(child, 0)
        assert holder(tmp_path) is None
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_owner_that_has_not_written_its_name_is_an_owner(owner, tmp_path):
    (tmp_path / NAME).write_text("")
    assert holder(tmp_path) == Holder("a machine that is not known", 0)


def test_without_locks_nobody_is_taken_for_the_owner(tmp_path, monkeypatch, capsys):
    """Where the name in the file outlives its process, runs that have ended would seem to go on for ever."""

    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with owned(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert "is on a file system without locks" in capsys.readouterr().err
    assert holder(tmp_path) is None


def test_a_directory_without_a_lock_has_no_owner(tmp_path):
    assert holder(tmp_path) is None
    assert holder(tmp_path / "missing") is None
