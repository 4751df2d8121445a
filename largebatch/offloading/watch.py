"""What a model does to weights during its first pass, beyond calling its modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.base.errors import UserError
from largebatch.offloading.flat import Group


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of a pass, and raises where one would be wrong with weights that travel.

    A weight is in host memory while no module that has it computes: who reads it then, reads another's. What is
    written into a weight or buffer on the device is lost. On a CPU neither would show: hence this, once.
    """

    def __init__(self, models: Mapping[str, nn.Module], groups: Sequence[Group], slots: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._paused = False
        self._models = models
        self._owners = {group.host.untyped_storage().data_ptr(): group for group in groups}
        self._slots = {memory.untyped_storage().data_ptr() for memory in slots}
        self._running: list[str] = []
        self._stack = ExitStack()

    def begin(self, name: str) -> None:
        """Watch what this thread computes from now on, in a model that it has entered."""
        self._running = [name]
        for prefix, model in self._models.items():
            for name, module in model.named_modules(prefix=prefix):
                if module is model:
                    continue
                self._stack.callback(module.register_forward_pre_hook(self._named(name), prepend=True).remove)
                self._stack.callback(module.register_forward_hook(self._done).remove)
        self._stack.enter_context(self)

    def end(self) -> None:
        """Stop watching."""
        self._stack.close()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Look away while weights move."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _named(self, name: str) -> Any:
        return lambda module, args: self._running.append(name)

    def _done(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look at an operation's tensors before it runs."""
        kwargs = kwargs or {}
        if not self._paused:
            for tensor in _tensors((args, kwargs)):
                if group := self._owners.get(_storage(tensor)):
                    raise UserError(self._foreign(group, tensor))
            if any(_storage(tensor) in self._slots for tensor in _written(func, args, kwargs)):
                raise UserError(
                    f"{self._reader()} writes into a weight or a buffer while it is evaluated, and what is written on "
                    "the device is lost: it cannot be offloaded by submodule."
                )
        return func(*args, **kwargs)

    def _foreign(self, group: Group, tensor: Tensor) -> str:
        return (
            f"{self._reader()} reads {group.name_at(tensor)} itself, instead of calling the module that has it, so it "
            "cannot be known when that must be on the device. Use mode=model, or groups=blocks where both are in one "
            "block."
        )

    def _reader(self) -> str:
        return (self._running[-1] if self._running else "") or "the model"


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in pytree.tree_leaves(values) if isinstance(value, Tensor))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that an operation says it writes to."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
