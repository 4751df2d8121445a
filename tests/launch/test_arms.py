"""The arms of a sweep in one process."""

import pytest

from largebatch.base.errors import Fault, UserError
from largebatch.base.outcome import Outcome
from largebatch.launch.arms import attempt, exit_status, one_by_one
from largebatch.launch.manifest import Arm


@pytest.mark.parametrize(
    ("statuses", "status"),
    [([], 0), ([0, 0], 0), ([0, 3], 0), ([0, 2], 1), ([1, 3], 1), ([1, 75], 75), ([0, 130], 130)],
)
def test_the_status_of_all(statuses, status):
    assert exit_status(statuses) == status


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("not that"), 2, "largebatch: not that\n"),
        (Fault("it broke"), 1, "largebatch: it broke\n"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("ours"), 1, "Traceback"),
    ],
)
def test_what_fails_is_said(capsys, error, status, said):
    def fail() -> Outcome:
        raise error

    assert attempt(fail).status == status
    assert capsys.readouterr().err.startswith(said)


def test_one_after_another_until_an_interruption(capsys):
    seen = []

    def work(values):
        seen.append(values["k"])
        return Outcome(75 if values["k"] == 2 else 2)

    arms = [Arm(f"k={k}", {"k": k}) for k in (1, 2, 3)]
    assert one_by_one(work, arms) == 75
    assert seen == [1, 2]
    assert capsys.readouterr().err == "── 1 of 3: k=1\n── 2 of 3: k=2\n"
