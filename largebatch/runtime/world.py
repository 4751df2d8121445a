"""The processes that run together: who this one is, and sums that do not depend on how many there are."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from largebatch.base.cores import allowed_cores
from largebatch.base.errors import Fault, UserError
from largebatch.base.outcome import MISTAKE
from largebatch.runtime.failure import keep_terminal
from largebatch.runtime.placement import Hardware, Placement

M = TypeVar("M", bound=nn.Module)

# A lost peer is an error in the end, not an endless wait. Whoever watches the processes is quicker, and says more.
TIMEOUT = datetime.timedelta(minutes=30)


def hardware(device: str = "auto") -> Hardware:
    """Return what this machine offers to one run.

    Args:
        device: The configuration's; CUDA is asked nothing unless it is ``cuda`` or ``auto``.

    Raises:
        Fault: there is a GPU that CUDA cannot use.
    """
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    mps = torch.backends.mps.is_available()
    if gpus:
        try:
            bf16 = torch.cuda.get_device_capability(0) >= (8, 0)  # older ones emulate it
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            driver = getattr(torch._C, "_cuda_getDriverVersion", int)()
            raise Fault(
                f"CUDA cannot use the GPU of this machine: {reason}. The driver serves CUDA up to {driver // 1000}."
                f"{driver % 1000 // 10}, and this PyTorch {torch.__version__} was built for CUDA {torch.version.cuda}: "
                "update the driver, install a PyTorch for its CUDA, or use device=cpu."
            ) from None
    else:
        onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        bf16 = not mps and onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Hardware(cores=allowed_cores(), gpus=gpus, mps=mps, bf16=bool(bf16))


def started_outside() -> tuple[int | None, int | None]:
    """Return (WORLD_SIZE, LOCAL_WORLD_SIZE) where torchrun or another launcher started this process, else Nones."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        _refuse_bare_srun()
        return None, None
    local = os.environ.get("LOCAL_WORLD_SIZE")
    return _count("WORLD_SIZE"), None if local is None else _count("LOCAL_WORLD_SIZE")


def _refuse_bare_srun() -> None:
    """Refuse to be one of several tasks of srun that have no ranks: each would train the whole run for itself."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or "SLURM_PROCID" not in os.environ:
        return
    if os.environ["SLURM_PROCID"] != "0":
        sys.exit(MISTAKE)  # task 0 says why
    raise UserError(
        f"srun has started {tasks} tasks without a rank, and each would train the whole run. Submit the run with "
        "`largebatch train launcher=slurm …`, or give the tasks ranks: srun bash -c 'RANK=$SLURM_PROCID "
        "WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID largebatch train …', with MASTER_ADDR and MASTER_PORT set."
    )


def _count(name: str) -> int:
    """Return a whole number that a launcher has set.

    Raises:
        UserError: it is not one.
    """
    text = os.environ[name]
    if not text.isdecimal():
        raise UserError(f"{name}={text} is not a whole number: the launcher that starts the processes sets it.")
    return int(text)


def rank_outside() -> int:
    """Return this process's rank: 0 where no launcher gave it one."""
    return _count("RANK") if "RANK" in os.environ else 0


@dataclass(frozen=True)
class World:
    """One process among ``size`` equal ones. Collective calls must be made by all of them, in one order.

    ``local_rank`` counts the processes of this machine from 0. ``store`` is where the processes met; a process that
    is alone has none.
    """

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0
    store: Store | None = None

    @property
    def main(self) -> bool:
        """Whether this process keeps the record."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum ``values`` over the processes in place, and return them.

        Where every element is non-zero in one process at most, the sum has the same bits for any number of
        processes: that is how per-worker and per-batch figures are gathered.
        """
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def tree_sum(self, values: Tensor) -> Tensor:
        """Sum over the processes in one fixed binary tree, in place; their number must be a power of two.

        Recursive doubling: in round r a process exchanges its sum with the one whose rank differs in bit r. As
        a + b and b + a have the same bits, every process ends with the same, those of a tree over the ranks in
        order, whatever the number of processes that the same terms are spread over.
        """
        other = torch.empty_like(values)
        distance = 1
        while distance < self.size:
            peer = self.rank ^ distance
            send, receive = dist.P2POp(dist.isend, values, peer), dist.P2POp(dist.irecv, other, peer)
            # Both in one call, in one order on both sides: NCCL would wait for ever otherwise.
            for request in dist.batch_isend_irecv([send, receive] if self.rank < peer else [receive, send]):
                request.wait()
            values.add_(other)
            distance *= 2
        return values

    def broadcast(self, values: Tensor) -> None:
        """Give every process the values of rank 0, in place."""
        if self.size > 1:
            dist.broadcast(values, src=0)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            self.sum(torch.zeros(1, device=self.device)).item()  # on a GPU a sum alone does not wait

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let rank 0 go first, then one process of every other machine, then the rest: what one fetched, they find."""
        turn = 0 if self.main else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.barrier()
        yield
        for _ in range(2 - turn):
            self.barrier()

    def redirect(self, directory: Path) -> None:
        """Send this process's output to a file of its own, ``rank<r>.log``."""
        directory.mkdir(parents=True, exist_ok=True)
        keep_terminal()
        with (directory / f"rank{self.rank}.log").open("ab", buffering=0) as log:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)


def join(placement: Placement, timeout: datetime.timedelta = TIMEOUT) -> World:
    """Join the process group that RANK and WORLD_SIZE describe, or be alone where they are not set.

    Uses NCCL between GPUs and gloo between CPUs, and sets this process's device and threads. ``timeout`` is how long
    a process waits for another, at the start and in every exchange.
    """
    torch.set_num_threads(placement.threads)
    size = started_outside()[0] or 1
    local_rank = _count("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank_outside()
    device = torch.device(placement.device)
    if placement.device == "cuda":
        # A launcher that shows each rank only its own GPU leaves one device, whatever the local rank.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if size == 1:
        return World(rank=0, size=1, device=device)
    # DDP imports this module, whose functions have the group of all processes as a default value. Imported when there
    # is one, they would hold it for ever, and with it its threads: see leave().
    importlib.import_module("torch.distributed.nn.functional")
    rank, store = rank_outside(), None
    if not dist.is_initialized():
        backend, device_id = ("nccl", device) if placement.device == "cuda" else ("gloo", None)
        store = _meet(rank, size, timeout)
        group = PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=timeout, device_id=device_id)
    return World(rank=rank, size=size, device=device, local_rank=local_rank, store=store)


def _meet(rank: int, size: int, timeout: datetime.timedelta) -> Store:
    """Return the store at MASTER_ADDR and MASTER_PORT, where the processes of a group meet.

    Raises:
        UserError: the address is missing or unknown, or the port is in use.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"RANK={rank} and WORLD_SIZE={size} are set, and {name} is not: set MASTER_ADDR to the machine of rank "
                "0 and MASTER_PORT to a free port of it, or let torchrun do so."
            )
    address, port = os.environ["MASTER_ADDR"], _count("MASTER_PORT")
    try:
        socket.getaddrinfo(address, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"MASTER_ADDR={address} MASTER_PORT={port} is no address here: {error}.") from None
    try:
        return cast(Store, next(rendezvous("env://", rank, size, timeout=timeout))[0])
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error) and "address already in use" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT={port} is in use on this machine: choose another one, below 32768 (30000, for example)."
        ) from None


def leave() -> None:
    """Leave the process group, if this process is in one; what holds it must be out of reach.

    DDP holds it in cycles of references. Kept alive by them, the group's threads would still run while the interpreter
    is torn down, and could crash a process whose work is done.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()
