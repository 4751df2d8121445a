"""Everything a run is, in one file: tensors and JSON, written atomically, verified before use.

The file's name carries the SHA-256 of its content, so that a torn file is known before a byte of it is used.
Nothing is unpickled: tensors are in safetensors, the rest is JSON in its header.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

SCHEMA = 1
KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """``tensors`` by name, ``state`` plain JSON values, and the file they came from."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


def write(directory: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write a checkpoint atomically and remove all but the newest ones.

    Args:
        directory: Made if missing.
        tensors: By name, on any device.
        state: JSON values; must hold ``iteration``.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema": SCHEMA, **state})
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"state": text})
    digest = hashlib.sha256(data).hexdigest()[:16]
    path = directory / f"{state['iteration']:09d}-{digest}.safetensors"
    write_atomically(path, data)
    for old in candidates(directory)[KEEP:]:
        old.unlink(missing_ok=True)
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` so that a reader sees the old content or the new, even after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def candidates(directory: Path) -> list[Path]:
    """Return the checkpoints of a directory, the newest iteration first, verified or not."""
    return sorted(directory.glob("[0-9]*-*.safetensors"), reverse=True)


def newest(directory: Path) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None; torn ones are passed over."""
    for path in candidates(directory):
        found = read(path)
        if found is not None:
            return found
    return None


def read(path: Path) -> Checkpoint | None:
    """Read one checkpoint, or return None if its content is not what its name says."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:16] != path.stem.split("-")[1]:
            return None
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, SafetensorError, KeyError, IndexError, ValueError):
        return None
    return Checkpoint(tensors, state, path) if state.get("schema") == SCHEMA else None


def pack(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a model's and its optimizer's tensors by name, and the optimizer's plain values."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    scalars: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                scalars[f"{index}.{name}"] = value
    for number, group in enumerate(optimizer.param_groups):
        if "step" in group:  # LAMB counts its steps by group
            scalars[f"group.{number}.step"] = int(group["step"])
    return tensors, scalars


def unpack(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's tensors back, in place: the inverse of :func:`pack`."""
    prefix = "model."
    model.load_state_dict(
        {name.removeprefix(prefix): value for name, value in checkpoint.tensors.items() if name.startswith(prefix)}
    )
    saved = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for name, value in checkpoint.tensors.items():
        if name.startswith("optimizer."):
            _, index, field = name.split(".", 2)
            state.setdefault(int(index), {})[field] = value
    for name, value in checkpoint.state["optimizer"].items():
        first, *rest = name.split(".")
        if first == "group":
            saved["param_groups"][int(rest[0])]["step"] = value
        else:
            state.setdefault(int(first), {})[rest[0]] = value
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state to safetensors under its own names, without metadata: equal weights, equal bytes."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, save(_untied(tensors)))


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give tied tensors memory of their own: safetensors refuses names that share it."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        result[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return result


def load_weights(model: nn.Module, path: Path) -> None:
    """Read what :func:`save_weights` wrote."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(path))
