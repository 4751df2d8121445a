"""One run, one owner: a lock on the run directory that the kernel takes from a dead process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from largebatch.base.errors import UserError

NAME = "lock"
PATIENCE = 10.0  # seconds: an owner that is on its way out, or a look at the lock, is waited for
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of this file system: Lustre without flock, some NFS


@dataclass(frozen=True)
class Holder:
    """The process that owns a run directory."""

    host: str
    pid: int


def holder(directory: Path) -> Holder | None:
    """Return the living owner of a run directory, or None. Not to be asked by the owner: it would lose the lock.

    On a file system without locks nobody is known to own anything.
    """
    try:
        file = (directory / NAME).open("rb")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            return _written(file.read())
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    return None


@contextlib.contextmanager
def owned(directory: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Own a run directory within ``with``; it must exist.

    A POSIX record lock: the kernel frees it when its owner dies, however it dies; loader processes do not inherit
    it; and it holds between the machines of a cluster where the file system passes locks on (NFS, Lustre with flock).

    Raises:
        UserError: another process owns it, and still does after ``patience`` seconds.
    """
    # Never truncated before it is owned: until then the name in it is the owner's.
    with os.fdopen(os.open(directory / NAME, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):  # POSIX allows either
                if time.monotonic() >= deadline:
                    file.seek(0)
                    owner = _written(file.read())
                    raise UserError(
                        f"run_dir={directory} is in use by process {owner.pid} on {owner.host}: wait until it has "
                        "ended, or use another run_dir."
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                print(
                    f"{directory} is on a file system without locks: that no other run uses it is not checked.",
                    file=sys.stderr,
                )
                break
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
            file.truncate(0)
            file.write(json.dumps(asdict(Holder(socket.gethostname(), os.getpid()))).encode())
            file.flush()
        yield


def _written(content: bytes) -> Holder:
    """Return the owner that the file names; one that has not come to write its name yet is process 0."""
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return Holder("a machine that is not known", 0)
