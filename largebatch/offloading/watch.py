"""Watch accesses to weights during a model's first pass, except calls of its modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of a pass: who reads a weight that is in host memory, and which weights are written.

    A weight is in host memory while no module that has it computes: who reads it then, reads another's. On a CPU that
    would not show. And what is written through ``tensor.data``, or by a batch norm, bumps no version counter.

    Args:
        models: Whose modules run, by name.
        read: Gets a tensor of some weight's memory and the innermost module that runs; returns what to compute with.
        written: Gets a tensor that an operation has written.
        left: Gets a module that has run.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        read: Callable[[Tensor, nn.Module | None], Tensor],
        written: Callable[[Tensor], None],
        left: Callable[[nn.Module], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._paused = False
        self._models, self._read, self._note, self._left = models, read, written, left
        self._name, self._thread = "", 0
        self._running: list[nn.Module] = []
        self._stack = ExitStack()

    def begin(self, name: str) -> None:
        """Watch what this thread computes from now on, in a model that it has entered."""
        self._name, self._thread = name, threading.get_ident()
        self._running = [self._models[name]]
        for model in self._models.values():
            for module in model.modules():
                if module is model:
                    continue
                self._stack.callback(module.register_forward_pre_hook(self._enter, prepend=True).remove)
                self._stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
        self._stack.enter_context(self)

    def is_of(self, name: str | None) -> bool:
        """Return whether this watches a model, or any where ``name`` is None, in this thread."""
        return self._thread == threading.get_ident() and name in (None, self._name)

    def end(self) -> None:
        """Stop watching."""
        self._stack.close()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Look away while weights move."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
        with self.pause():
            self._left(module)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look at an operation's tensors, before it runs and after."""
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        reader = self._running[-1] if self._running else None
        with self.pause():
            args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: self._read(tensor, reader), (args, kwargs))
        result = func(*args, **kwargs)
        with self.pause():
            for tensor in _written(func, args, kwargs):
                self._note(tensor)
        return result


def address(tensor: Tensor) -> int:
    """Return where a tensor's storage begins; 0 for what has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that an operation says it writes to, and running statistics that it does not say."""
    values = {argument.name: kwargs.get(argument.name) for argument in func._schema.arguments}
    values |= {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    learns = values.get("training") or values.get("use_input_stats") or values.get("train")
    for argument in func._schema.arguments:
        declared = argument.alias_info is not None and argument.alias_info.is_write
        if declared or (learns and argument.name.startswith("running_")):
            leaves = pytree.tree_leaves(values[argument.name])
            yield from (value for value in leaves if isinstance(value, Tensor))
