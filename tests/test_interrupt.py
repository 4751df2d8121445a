import signal
import subprocess
import sys

import pytest

from largebatch.interrupt import Signals


@pytest.mark.parametrize(("number", "wishes"), [(signal.SIGINT, (True, False)), (signal.SIGTERM, (False, True))])
def test_the_first_signal_is_a_wish_and_handlers_come_back(number, wishes):
    before = signal.getsignal(number)
    with Signals() as signals:
        assert (signals.interrupt, signals.end) == (False, False)
        signal.raise_signal(number)
        assert (signals.interrupt, signals.end) == wishes
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(number):
    program = (
        "import signal; from largebatch.interrupt import Signals\n"
        f"with Signals():\n for _ in range(2): signal.raise_signal({int(number)})\n print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -number
    assert done.stdout == ""
