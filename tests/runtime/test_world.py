"""The environment that launchers set, and a GPU that CUDA cannot use: mistakes in a sentence."""

import datetime
import socket

import pytest
import torch

from largebatch.base.errors import Fault, UserError
from largebatch.runtime.world import _meet, hardware, rank_outside, started_outside

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
SECOND = datetime.timedelta(seconds=1)


@pytest.fixture
def environment(monkeypatch):
    """Return a function that sets a launcher's variables; all others are unset."""
    for name in (*NAMES, *SLURM):
        monkeypatch.delenv(name, raising=False)

    def set_all(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_a_process_that_nothing_has_started(environment):
    assert (started_outside(), rank_outside()) == ((None, None), 0)
    environment(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1")
    assert started_outside() == (None, None)


def test_a_rank_of_a_launcher(environment):
    environment(RANK="3", WORLD_SIZE="8", LOCAL_WORLD_SIZE="4", SLURM_PROCID="3", SLURM_STEP_NUM_TASKS="8")
    assert (started_outside(), rank_outside()) == ((8, 4), 3)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_a_number_that_is_none(environment, name):
    environment(**{"RANK": "0", "WORLD_SIZE": "2", name: "two"})
    with pytest.raises(UserError, match=f"{name}=two is not a whole number"):
        started_outside()


def test_several_tasks_of_srun_without_ranks_are_refused_once(environment):
    environment(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="4")
    with pytest.raises(
        UserError, match=r"srun has started 4 tasks without a rank.*launcher=slurm.*RANK=\$SLURM_PROCID"
    ):
        started_outside()
    environment(SLURM_PROCID="1")
    with pytest.raises(SystemExit) as end:  # task 0 has said why
        started_outside()
    assert end.value.code == 2


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_address(environment, missing, monkeypatch):
    environment(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=f"RANK=0 and WORLD_SIZE=2 are set, and {missing} is not"):
        _meet(0, 2, SECOND)


def test_an_address_that_does_not_exist(environment):
    environment(MASTER_ADDR="no-such-machine.invalid", MASTER_PORT="29500")
    with pytest.raises(UserError, match=r"MASTER_ADDR=no-such-machine\.invalid MASTER_PORT=29500 is no address here"):
        _meet(0, 2, SECOND)


def test_a_port_that_is_in_use(environment):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with pytest.raises(UserError, match=f"MASTER_PORT={port} is in use on this machine"):
            _meet(0, 2, SECOND)


def test_a_gpu_that_cuda_cannot_use(monkeypatch):
    def broken(*_):
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nMore.")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 11040, raising=False)
    assert hardware("cpu").gpus == 0
    for device in ("auto", "cuda"):
        with pytest.raises(Fault, match=r"driver on your system is too old .*serves CUDA up to 11\.4.*device=cpu"):
            hardware(device)
