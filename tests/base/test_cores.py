import os

import pytest

from largebatch.base import cores


@pytest.fixture(autouse=True)
def _a_machine_of_16(monkeypatch):
    monkeypatch.setattr(cores, "affinity", lambda: list(range(16)))


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "0::/job/task\n",
                "sys/fs/cgroup/job/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/job/task/cpu.max": "max 100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/a\n4:cpu,cpuacct:/a\n0::/\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            16,
        ),
    ],
)
def test_a_quota_limits_the_cores(tmp_path, files, allowed):
    write(tmp_path, files)
    assert cores.allowed_cores(tmp_path, {}) == allowed


def test_slurm_limits_the_cores_of_a_job_alone(tmp_path):
    assert cores.allowed_cores(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "6"}) == 6
    assert cores.allowed_cores(tmp_path, {"SLURM_CPUS_ON_NODE": "6"}) == 16
    assert cores.allowed_cores(tmp_path, {"SLURM_JOB_ID": "7"}) == 16


def test_affinity_limits_the_cores(monkeypatch, tmp_path):
    monkeypatch.undo()
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5, 3})
        assert cores.affinity() == [3, 5]
        assert cores.allowed_cores(tmp_path, {}) == 2
