"""Calls that would take a model's weights from where they are, refused with a sentence while they travel."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from largebatch.base.errors import UserError

COMPILER = os.path.join("_dynamo", "eval_frame.py")  # noqa: PTH118  # the end of its path
COMPILED = "compiled code does not wait for weights that travel: offload the model as it was before torch.compile"


class Guard:
    """Takes hold of what would move, copy or load the weights of modules while they are offloaded.

    Args:
        modules: All of the models', by name.
        saved: Returns a weight as it lies in host memory, or None for a tensor that does not travel.
    """

    def __init__(self, modules: Mapping[nn.Module, str], saved: Callable[[Tensor], Tensor | None]) -> None:
        self._modules, self._saved = modules, saved

    def start(self, stack: ExitStack) -> None:
        """Stand in every module until ``stack`` ends."""
        for module in self._modules:
            loading = module.register_load_state_dict_pre_hook(_refuse_loading)  # type: ignore[no-untyped-call]
            stack.callback(loading.remove)
            saving = module.register_state_dict_post_hook(_Saving(self._saved))  # type: ignore[no-untyped-call]
            stack.callback(saving.remove)
            for name, call in (
                ("_apply", self._apply(module)),  # of .half(), .to() and the like
                ("share_memory", _refuse_sharing),
                ("__deepcopy__", _refuse_copying),
                ("__reduce_ex__", _refuse_pickling),
                ("__prepare_scriptable__", _refuse_scripting),
            ):
                before = module.__dict__.get(name)
                stack.callback(_put_back, module, name, before)
                module.__dict__[name] = call

    def _apply(self, module: nn.Module) -> Callable[..., nn.Module]:
        def apply(change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
            own = [*module._parameters.items(), *module._buffers.items()]
            name = self._modules[module]
            for key, tensor in own:
                if tensor is not None and change(tensor) is not tensor:
                    raise UserError(
                        f"{name + '.' if name else ''}{key} was to change its type or its place inside of an "
                        "offloading context, where its memory is laid out: call .half(), .to() and the like before."
                    )
            for child in module.children() if recurse else ():
                child._apply(change)  # type: ignore[no-untyped-call]
            return module

        return apply


class _Saving:
    """Lets a state_dict show weights in host memory, each in a storage of its own, as those that save them need it."""

    def __init__(self, saved: Callable[[Tensor], Tensor | None]) -> None:
        self._saved = saved

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            shown = state.get(prefix + name)
            # With keep_vars=True it is the tensor itself that is wanted.
            if tensor is not None and isinstance(shown, Tensor) and shown is not tensor:
                home = self._saved(tensor)
                if home is not None:
                    state[prefix + name] = home.detach()


def check_uncompiled(name: str, module: nn.Module) -> None:
    """Raise where a module is TorchScript's or compiled, itself or its forward.

    Raises:
        UserError: it is.
    """
    shown = name or "the model"
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError(
            f"{shown} is TorchScript, which reads its weights without PyTorch's modules, and so does not wait for "
            "them: offload the model as it was before torch.jit."
        )
    forward = getattr(module, "forward", None)
    if (
        module._compiled_call_impl is not None
        or hasattr(module, "_orig_mod")
        or hasattr(forward, "_torchdynamo_orig_callable")
    ):
        raise UserError(f"{shown} is compiled, and {COMPILED}.")


def check_call() -> None:
    """Raise where a pass is traced or compiled: from a hook, at its beginning.

    Raises:
        UserError: it is.
    """
    if torch._C._get_tracing_state() is not None:
        raise UserError(
            "a model was traced by torch.jit inside of an offloading context, where its weights travel: trace it "
            "before the context, or after it."
        )
    if torch.compiler.is_compiling() or _called_by_the_compiler():
        raise UserError(f"the model is called from code that torch.compile or torch.export made, and {COMPILED}.")


def _called_by_the_compiler() -> bool:
    """Return whether this is called through compiled code, which PyTorch does not tell of where it stops compiling."""
    if "torch._dynamo" not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.endswith(COMPILER):
        frame = frame.f_back
    return frame is not None


def _put_back(module: nn.Module, name: str, before: Any) -> None:
    if before is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = before


def _refuse_loading(*_: Any) -> NoReturn:
    raise UserError(
        "load_state_dict was called inside of an offloading context, where some weights are copies on the device and "
        "would be lost: load them before, or after it."
    )


def _refuse_sharing() -> NoReturn:
    raise UserError("share_memory was called inside of an offloading context: call it before, or after it.")


def _refuse_copying(memo: Any) -> NoReturn:
    raise UserError(
        "a model was copied inside of an offloading context, where its weights are views of memory that travels: "
        "call copy.deepcopy before the context, or after it."
    )


def _refuse_pickling(protocol: Any) -> NoReturn:
    raise UserError(
        "a model was pickled inside of an offloading context, where its weights are views of memory that travels: "
        "save model.state_dict(), or the model before the context, or after it."
    )


def _refuse_scripting() -> NoReturn:
    raise UserError(
        "a model was given to torch.jit.script inside of an offloading context, where its weights travel: do so before "
        "the context, or after it."
    )


def modules_of(models: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """Return all modules of some models with their names."""
    found: dict[nn.Module, str] = {}
    for prefix, model in models.items():
        for name, module in model.named_modules(prefix=prefix):
            found.setdefault(module, name)
    return found


def buffers_of(modules: Iterable[nn.Module]) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Return where each weight and buffer is registered: a module's dictionary, its name there, and itself."""
    return [
        (place, name, tensor)
        for module in modules
        for place in (module._parameters, module._buffers)
        for name, tensor in place.items()
        if tensor is not None
    ]
