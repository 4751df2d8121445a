"""Everything a run is, in one file: tensors and JSON, written atomically, verified before use.

The file's name carries the SHA-256 of its content, so that a torn file is known before a byte of it is used.
Nothing is unpickled: tensors are in safetensors, the rest is JSON in its header.

A :class:`Snapshot` is taken on the training path, which costs a copy on the device; a :class:`Writer` puts it on the
disk from a thread of its own, while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from largebatch.base.errors import UserError
from largebatch.base.files import write_atomically

SCHEMA = 2
BEST = "best-"  # before the name of the checkpoint with the lowest validation error


@dataclass(frozen=True)
class Checkpoint:
    """``tensors`` by name, ``state`` plain JSON values, and the file they came from."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


class Snapshot:
    """A run at one moment, copied so that training may go on.

    Args:
        tensors: By name, on any device; copied there.
        state: JSON values; must hold ``iteration``. Turned into text at once.
    """

    def __init__(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.iteration = int(state["iteration"])
        self.text = json.dumps({"schema": SCHEMA, **state})
        self._tensors = {name: value.detach().clone() for name, value in tensors.items()}
        self._copied = None
        if any(value.is_cuda for value in tensors.values()):
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def on_host(self) -> dict[str, Tensor]:
        """Return the tensors in CPU memory, without keeping the stream that trains waiting."""
        if self._copied is None:
            return {name: value.cpu().contiguous() for name, value in self._tensors.items()}
        # Not the stream that trains; the copy, into ordinary memory, keeps no more than this thread waiting.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            stream.wait_event(self._copied)
            return {name: value.cpu().contiguous() for name, value in self._tensors.items()}


class Writer:
    """Writes snapshots in the background, one after another.

    Args:
        directory: Of the checkpoints; made if missing.
        keep: How many of the newest stay there; the best one stays beside them.
        before: Called in the background before a snapshot is written: what it refers to must be on the disk first.
        complain: Called in the background with a sentence when one could not be written; training goes on.
    """

    def __init__(self, directory: Path, keep: int, before: Callable[[], None], complain: Callable[[str], None]) -> None:
        self._directory, self._keep, self._before, self._complain = directory, keep, before, complain
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._going: Future[None] | None = None

    def submit(self, snapshot: Snapshot | None, best: Snapshot | None = None) -> None:
        """Write a checkpoint, and ``best`` as the best one; waits while an earlier call is still at it."""
        self.finish()
        self._going = self._pool.submit(self._write, snapshot, best)

    def finish(self) -> None:
        """Wait until what was submitted is on the disk, or has been complained of."""
        if self._going is not None:
            self._going.result()
            self._going = None

    def close(self) -> None:
        """Wait until nothing is being written any more, however it went."""
        self._pool.shutdown()

    def _write(self, snapshot: Snapshot | None, best: Snapshot | None) -> None:
        for one, keep, prefix in ((snapshot, self._keep, ""), (best, 1, BEST)):
            if one is None:
                continue
            try:
                self._before()
                write(self._directory, one, keep, prefix)
            except OSError as error:
                self._complain(f"no checkpoint of iteration {one.iteration} could be written: {error}")


def write(directory: Path, snapshot: Snapshot, keep: int, prefix: str = "") -> Path:
    """Write a checkpoint atomically, and remove all but the newest ``keep`` of those whose name starts like it.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    data = save(snapshot.on_host(), {"state": snapshot.text})
    digest = hashlib.sha256(data).hexdigest()[:16]
    path = directory / f"{prefix}{snapshot.iteration:09d}-{digest}.safetensors"
    write_atomically(path, data)
    for old in _named(directory, prefix)[keep:]:
        old.unlink(missing_ok=True)
    return path


def sweep_up(directory: Path) -> None:
    """Remove what a writer that was killed had not finished; for the owner of the directory alone."""
    for unfinished in directory.glob(".*.tmp"):
        unfinished.unlink()


def _named(directory: Path, prefix: str) -> list[Path]:
    ours = re.compile(rf"{prefix}\d{{9,}}-[0-9a-f]{{16}}\.safetensors")
    found = [path for path in directory.glob("*.safetensors") if ours.fullmatch(path.name)]
    return sorted(found, key=iteration_of, reverse=True)


def iteration_of(path: Path) -> int:
    """Return the iteration that a checkpoint's name states."""
    return int(path.name.removeprefix(BEST).partition("-")[0])


def candidates(directory: Path) -> list[Path]:
    """Return the checkpoints of a directory, the newest iteration first, verified or not, the best among them."""
    return sorted(_named(directory, "") + _named(directory, BEST), key=iteration_of, reverse=True)


def newest(directory: Path) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None; torn ones are passed over."""
    return next(verified(directory), None)


def verified(directory: Path) -> Iterator[Checkpoint]:
    """Yield the checkpoints that verify, the newest first."""
    for path in candidates(directory):
        found = read(path)
        if found is not None:
            yield found


def read(path: Path) -> Checkpoint | None:
    """Read one checkpoint, or return None if its content is not what its name says.

    Raises:
        UserError: it is whole, but another version of largebatch wrote it.
    """
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:16] != path.stem.split("-")[-1]:
            return None
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, SafetensorError, KeyError, IndexError, ValueError):
        return None
    if state.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has schema {state.get('schema')}, and this version of largebatch reads schema {SCHEMA}: go on "
            "with the version that wrote it (provenance.json names it), or use another run_dir."
        )
    return Checkpoint(tensors, state, path)


def pack(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a model's and its optimizer's tensors by name, and the optimizer's plain values."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    scalars: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            elif value is None or isinstance(value, int | float | str):
                scalars[f"{index}.{name}"] = value
            else:
                raise UserError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as '{name}' of a parameter's state, "
                    "which no checkpoint can hold: tensors and numbers alone."
                )
    for number, group in enumerate(optimizer.param_groups):
        for name in kept_by_group(optimizer) & group.keys():
            if name == "step":
                scalars[f"group.{number}.step"] = int(group["step"])
            elif isinstance(group[name], int | float):
                scalars[f"group.{number}.{name}"] = group[name]
    return tensors, scalars


def kept_by_group(optimizer: Optimizer) -> set[str]:
    """Return which values of groups are state: of LAMB its steps, of an optimizer of the user's own all but rates."""
    if type(optimizer).__module__.partition(".")[0] in ("torch", "timm", "largebatch"):
        return {"step"}
    return {name for group in optimizer.param_groups for name in group} - {"params", "lr", "weight_decay"}


def unpack(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's tensors back, in place: the inverse of :func:`pack`."""
    prefix = "model."
    model.load_state_dict(
        {name.removeprefix(prefix): value for name, value in checkpoint.tensors.items() if name.startswith(prefix)}
    )
    saved = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in checkpoint.tensors.items():
        if name.startswith("optimizer."):
            _, index, field = name.split(".", 2)
            like = parameters[int(index)]
            if value.shape == like.shape:  # fused kernels want momentum to lie as the weights do, channels_last too
                value = torch.empty_like(like).copy_(value)
            state.setdefault(int(index), {})[field] = value
    for name, value in checkpoint.state["optimizer"].items():
        first, *rest = name.split(".")
        if first == "group":
            saved["param_groups"][int(rest[0])][rest[1]] = value
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
