"""How a machine is shared out; the processes themselves are in tests/e2e/test_sweeps.py."""

import pytest

from largebatch.sweep.local import shares


@pytest.mark.parametrize(
    ("count", "jobs", "expected"),
    [
        (8, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (8, 3, [[0, 1], [2, 3, 4], [5, 6, 7]]),
        (2, 4, [[0], [0], [1], [1]]),
        (1, 3, [[0], [0], [0]]),
        (3, 1, [[0, 1, 2]]),
        (0, 2, [[], []]),
    ],
)
def test_every_job_has_its_share_or_shares_one(count, jobs, expected):
    assert [list(share) for share in shares(list(range(count)), jobs)] == expected
