"""How a machine is shared out; the processes themselves are in tests/e2e/test_sweeps.py."""

import pytest

from largebatch.launch.parallel import _gpus, shares


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


@pytest.mark.parametrize(
    ("said", "gpus"), [("GPU-1a\nGPU-2b\n", ["GPU-1a", "GPU-2b"]), ("No devices were found\n", [])]
)
def test_gpus_are_those_that_the_driver_names_or_the_user_left_visible(tmp_path, monkeypatch, said, gpus):
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _gpus() == gpus
    for visible, left in (("3,5", ["3", "5"]), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert _gpus() == left
