"""Passes of models whose weights are laid out in flat buffers: what all modes of offloading have in common."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from largebatch.base.errors import UserError
from largebatch.offloading import lockstep
from largebatch.offloading.flat import Group
from largebatch.offloading.gate import Gate
from largebatch.offloading.guard import Guard, buffers_of, check_call, modules_of
from largebatch.offloading.inputs import Border
from largebatch.offloading.statistics import Statistics
from largebatch.offloading.transport import Transport
from largebatch.offloading.watch import Watch, address


class Passes:
    """Takes hold of models' calls, and finds what a pass writes into weights and buffers.

    A write is carried back to host memory when the pass has ended, or its group leaves the device: version counters
    show it in every pass, and the first pass of each model is watched for what bumps none. So a model computes as if
    its weights had never moved, whatever the mode and the budget.

    A subclass moves the weights: ``_move_in``, ``_move_out``, ``_on_device``; and it may take part in ``_begin``,
    ``_end`` (of a pass that came to its end) and ``_clean_up`` (of any).
    """

    shared = False  # whether several threads may compute at a time

    def __init__(self, models: Mapping[str, nn.Module], transport: Transport, statistics: Statistics) -> None:
        self._models, self._transport, self._statistics = models, transport, statistics
        self._modules = modules_of(models)
        self._registered = buffers_of(self._modules)
        self._numbers: dict[int, tuple[Group, int]] = {}  # by each tensor's id
        self._gate = Gate()
        self._watch: Watch | None = None
        self._seen: set[str] = set()  # models whose first pass has been watched

    def start(self, stack: ExitStack) -> None:
        """Move the weights into flat buffers, and take hold of the models' calls; ``stack`` undoes it."""
        stack.callback(self._gate.open)
        stack.callback(self._bring_home)
        stack.callback(self._restore)
        self._move_in()
        self._index()
        self._take_hold(stack)
        border = Border(self._transport.device)
        for name, model in self._models.items():
            stack.callback(model.register_forward_pre_hook(self._beginning(name), prepend=True).remove)
            stack.callback(model.register_forward_hook(self._ending(name)).remove)
            stack.callback(model.register_forward_hook(self._leaving(name), always_call=True).remove)
            border.guard(model, stack)
            stack.callback(model.register_forward_pre_hook(_check_call(name), prepend=True).remove)  # the first of all
        Guard(self._modules, self._saved).start(stack)
        stack.callback(self._gate.close)

    def _groups_all(self) -> list[Group]:
        """Return every group, also what stays on the device."""
        raise NotImplementedError

    def _memory_of(self, group: Group) -> Tensor | None:
        """Return the device memory of which a group's tensors are views; None where they are in host memory."""
        raise NotImplementedError

    def _move_in(self) -> None:
        raise NotImplementedError

    def _move_out(self) -> None:
        raise NotImplementedError

    def _take_hold(self, stack: ExitStack) -> None:
        """Hook modules within the models, before the models themselves are hooked."""

    def _begin(self, name: str) -> None:
        """Begin a pass of a model."""

    def _end(self, name: str) -> None:
        """End a pass that came to its end."""

    def _clean_up(self) -> None:
        """Leave nothing of a pass behind, also after an exception."""

    def _index(self) -> None:
        self._numbers = {
            id(tensor): (group, number) for group in self._groups_all() for number, tensor in enumerate(group.tensors)
        }

    def _restore(self) -> None:
        self._stop_watching()
        try:
            self._clean_up()
            self._carry()
        finally:
            self._move_out()

    def _beginning(self, name: str) -> Any:
        def begin(module: nn.Module, args: Any) -> None:
            if lockstep.current(self) is None and (self.shared or self._gate.enter(name, may_wait=True)):
                self._start_pass(name)

        return begin

    def _start_pass(self, name: str) -> None:
        if self._watch is not None and not self.shared:
            self._stop_watching()  # hooks that come last are not called after KeyboardInterrupt
        self._clean_up()
        self._settle()
        self._begin(name)
        if name not in self._seen and self._watch is None:
            self._seen.add(name)
            self._watch = Watch(self._models, self._read, self._note, self._left)
            self._watch.begin(name)

    def _ending(self, name: str) -> Any:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            if lockstep.current(self) is None and (self.shared or self._gate.ends()):
                self._finish(name)
            self._statistics.passes += 1

        return end

    def _finish(self, name: str) -> None:
        self._stop_watching(name)
        self._end(name)
        self._settle()

    def _leaving(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if lockstep.current(self) is None and (self.shared or self._gate.ends()):
                self._leave(name)

        return leave

    def _leave(self, name: str) -> None:
        try:
            self._stop_watching(name)
            self._clean_up()
            self._carry()
        finally:
            if not self.shared:
                self._gate.leave()

    def _stop_watching(self, name: str | None = None) -> None:
        """Stop watching a model's pass in this thread; None: any."""
        watch = self._watch
        if watch is not None and watch.is_of(name):
            self._watch = None
            watch.end()

    def _read(self, tensor: Tensor, reader: nn.Module | None) -> Tensor:
        """Return what an operation of a watched pass computes with instead of a tensor."""
        return tensor

    def _note(self, tensor: Tensor) -> None:
        """Note that an operation of a watched pass has written a tensor."""
        for group in self._groups_all():
            memory = self._memory_of(group)
            if memory is not None and address(memory) == address(tensor) != 0:
                group.always.add(group.region_at(tensor.data_ptr() - memory.data_ptr()))

    def _left(self, module: nn.Module) -> None:
        """Note that a module has run in a watched pass."""

    def _carry(self) -> None:
        """Bring what was written on the device to host memory."""
        for group in self._groups_all():
            memory = self._memory_of(group)
            if memory is not None:
                self._statistics.bytes_from_device += group.carry(memory)

    def _settle(self) -> None:
        """Take over tensors that were put in place of ours, of the same shape and type.

        Raises:
            UserError: of another one, or a new parameter.
        """
        for group in self._groups_all():
            self._take_strayed(group)
        for place, name, tensor in self._registered:
            value = place.get(name)
            if value is not tensor:
                group, number = self._numbers[id(tensor)]
                if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
                    self._refuse_new(group, number, value)
                if not group.take(number, value):
                    self._refuse_new(group, number, value)
                place[name] = tensor

    def _take_strayed(self, group: Group) -> None:
        for number in group.strayed():
            if not group.take(number, group.tensors[number].data):
                self._refuse_new(group, number, group.tensors[number])

    def _refuse_new(self, group: Group, number: int, value: Any) -> NoReturn:
        tensor = group.home(number)
        new = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(
            f"{group.name(number)}, {tuple(tensor.shape)} of {tensor.dtype}, was replaced by {new} inside of an "
            "offloading context: a buffer may be replaced by one of the same shape and type, all else before the "
            "context."
        )

    def _saved(self, tensor: Tensor) -> Tensor | None:
        """Return a weight as it is in host memory."""
        if id(tensor) not in self._numbers:
            return None
        group, number = self._numbers[id(tensor)]
        memory = self._memory_of(group)
        if memory is not None:
            self._statistics.bytes_from_device += group.carry(memory)
        return group.home(number)

    def _bring_home(self) -> None:
        """Bring what was put in place of our tensors, and is on the device, to host memory."""
        for place, name, tensor in self._registered:
            value = place.get(name)
            for one in {id(tensor): tensor, id(value): value}.values():
                if isinstance(one, Tensor) and one.device.type != "cpu":
                    one.data = one.data.cpu()


def _check_call(name: str) -> Any:
    def check(module: nn.Module, args: Any) -> None:
        check_call()
        check_mode(name, module)

    return check


def check_mode(name: str, module: nn.Module) -> None:
    """Raise where weights would be lost: in training, or where a gradient would need them later.

    Raises:
        UserError: either of these.
    """
    if module.training:
        raise UserError(
            f"{name or 'the model'} is in training mode: what it learns on the device would be lost. Call model.eval() "
            "before offloading."
        )
    if torch.is_grad_enabled():
        raise UserError(
            "gradients are enabled, and weights that have left the device have none: call the model under "
            "torch.no_grad() or torch.inference_mode()."
        )
