import signal
import subprocess
import sys

import pytest

from largebatch.base.signals import Ended, Signals, ended_by_signals


@pytest.mark.parametrize(("number", "wishes"), [(signal.SIGINT, (True, False)), (signal.SIGTERM, (False, True))])
def test_the_first_signal_is_a_wish_and_handlers_come_back(number, wishes):
    before = signal.getsignal(number)
    with Signals() as signals:
        assert (signals.interrupt, signals.end) == (False, False)
        signal.raise_signal(number)
        assert (signals.interrupt, signals.end) == wishes
    assert signal.getsignal(number) == before


def test_ctrl_c_is_acknowledged_at_once(capfd):
    with Signals():
        signal.raise_signal(signal.SIGINT)
        assert "finishing the iteration, then writing a checkpoint; Ctrl-C again ends at once" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(number):
    program = (
        "import signal; from largebatch.base.signals import Signals\n"
        f"with Signals():\n for _ in range(2): signal.raise_signal({int(number)})\n print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -number
    assert done.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_that_was_ignored_stays_ignored(number):
    """As under nohup, or in the background of a script."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with ended_by_signals(), Signals() as signals:
            signal.raise_signal(number)
            assert signals.received is None
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_hangup_asks_for_the_end_and_a_sigterm_beside_it_is_the_first(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # also where these tests run under nohup
    with Signals() as signals:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)
            assert signals.end
        assert signals.received == signal.SIGTERM
    with ended_by_signals(), pytest.raises(Ended):
        signal.raise_signal(signal.SIGHUP)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell of a parent's death")
@pytest.mark.parametrize("parent_first", [False, True])
def test_a_tied_process_ends_with_its_parent(parent_first):
    """The parent is killed while the child is busy, or before the child has tied itself."""
    program = (
        "import os, signal, time\n"
        "from largebatch.base.signals import end_with\n"
        "parent = os.getpid()\n"
        "said, tied = os.pipe()\n"
        "if os.fork():\n"
        f"    {parent_first} or os.read(said, 1)\n"
        "    os.kill(parent, signal.SIGKILL)\n"
        f"while {parent_first} and os.getppid() == parent: time.sleep(0.01)\n"
        "end_with(parent)\n"
        "os.write(tied, b'.')\n"
        "time.sleep(600)\n"
        "print('outlived it')\n"
    )
    # Its output ends when the last process that could write to it is gone.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == done.stderr == ""
