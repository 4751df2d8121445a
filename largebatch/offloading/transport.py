"""Copy weights to a device: a few operations, for CUDA and for the CPU.

A slot is a piece of device memory. Between :meth:`Transport.copy` and :meth:`Transport.wait` its content is on the
way; after :meth:`Transport.record` it may be written over. Nothing travels back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from largebatch.base.errors import Fault, UserError

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


@dataclass(eq=False)
class Slot:
    """Device memory, uint8, with two events: its content has arrived; what used it is done."""

    memory: Tensor
    arrived: torch.Event | None = None
    used: torch.Event | None = None


class Transport(Protocol):
    """Operations that copy weights."""

    device: torch.device

    def pin(self, memory: Tensor) -> None:
        """Get pages of host memory ready to be copied from.

        Raises:
            Fault: the machine does not allow it.
        """

    def unpin(self, memory: Tensor) -> None:
        """Make them ordinary memory again."""

    def allocate(self, size: int) -> Slot:
        """Return a slot of ``size`` bytes."""

    def copy(self, slot: Slot, source: Tensor) -> None:
        """Start to fill a slot from host memory, once what was recorded on it is done."""

    def wait(self, slot: Slot) -> None:
        """Let computation that follows wait until the slot is filled."""

    def record(self, slot: Slot) -> None:
        """Say that computation so far is the last that reads the slot's content."""

    def release(self, slot: Slot) -> None:
        """Give a slot's memory back."""

    def close(self) -> None:
        """Wait for what is on the way."""


class CpuTransport:
    """Copies at once, into memory beside the weights: the same machinery on a machine without a device."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def pin(self, memory: Tensor) -> None:
        """It is ready."""

    def unpin(self, memory: Tensor) -> None:
        """It is ordinary memory."""

    def allocate(self, size: int) -> Slot:
        """Return a slot of ordinary memory."""
        return Slot(torch.empty(size, dtype=torch.uint8))

    def copy(self, slot: Slot, source: Tensor) -> None:
        """Copy now."""
        slot.memory[: len(source)].copy_(source)

    def wait(self, slot: Slot) -> None:
        """It is there."""

    def record(self, slot: Slot) -> None:
        """Computation is done when it returns."""

    def release(self, slot: Slot) -> None:
        """The memory goes with its last reader."""
        slot.memory = slot.memory.new_empty(0)

    def close(self) -> None:
        """Nothing is on the way."""


class CudaTransport:
    """Copies from pinned memory on a stream of their own, beside computation on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pin(self, memory: Tensor) -> None:
        """Pin the pages where they are, after they were filled: PyTorch's pinned allocator would need a second copy."""
        code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), PORTABLE))  # type: ignore[no-untyped-call]
        if code:
            raise Fault(
                f"{memory.numel():,} bytes of host memory could not be pinned (CUDA error {code}): the memory that a "
                "process or container may lock is limited (ulimit -l). Raise the limit, or take a smaller network."
            )

    def unpin(self, memory: Tensor) -> None:
        """Unpin them."""
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))  # type: ignore[no-untyped-call]

    def allocate(self, size: int) -> Slot:
        """Return a slot that belongs to the current stream, as its users do."""
        memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        slot = Slot(memory, torch.cuda.Event(), torch.cuda.Event())  # type: ignore[no-untyped-call]
        self.record(slot)
        return slot

    def copy(self, slot: Slot, source: Tensor) -> None:
        """Queue a copy on the side stream, behind the last use of the slot."""
        assert slot.used is not None
        assert slot.arrived is not None
        self._stream.wait_event(slot.used)
        with torch.cuda.stream(self._stream):
            slot.memory[: len(source)].copy_(source, non_blocking=True)
            slot.arrived.record(self._stream)

    def wait(self, slot: Slot) -> None:
        """Let the current stream wait, not the host."""
        assert slot.arrived is not None
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(slot.arrived)
        slot.memory.record_stream(stream)  # it may be another one than that of allocate, to which the memory returns

    def record(self, slot: Slot) -> None:
        """Mark this point of the current stream."""
        assert slot.used is not None
        slot.used.record(torch.cuda.current_stream(self.device))

    def release(self, slot: Slot) -> None:
        """Give the memory to the current stream's later tensors, which come after a copy that is still on the way."""
        self.wait(slot)
        slot.memory = slot.memory.new_empty(0)

    def close(self) -> None:
        """Wait until the side stream has nothing left."""
        self._stream.synchronize()


def make_transport(device: torch.device) -> Transport:
    """Return the transport to a device.

    Raises:
        UserError: a device that is not here, or that nothing is carried to.
    """
    if device.type == "cpu":
        return CpuTransport()
    if device.type != "cuda":
        raise UserError(f"device={device} cannot be offloaded to: it takes cuda, or cpu to try it out.")
    if not torch.cuda.is_available():
        raise UserError(f"device={device}, but PyTorch finds no CUDA device here. Use device=cpu to try it out.")
    return CudaTransport(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))
