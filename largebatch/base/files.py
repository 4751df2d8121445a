"""Files that a reader sees whole, or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path
from typing import Annotated

from largebatch.base.errors import UserError

UserPath = Annotated[str, "a path"]  # as a user writes it: ~ at its beginning is the home directory


def at_home(path: str) -> str:
    """Return a path with ``~`` or ``~name`` at its beginning replaced by that home directory.

    Raises:
        UserError: there is no such user.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise UserError(f"{path} names the home of a user who does not exist: ./{path} is a file here.") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` so that a reader sees the old content or the new, even after a power cut.

    Raises:
        OSError: it cannot be written; what was there is untouched.
    """
    # A process number would not do: on another node, or in a container, another process may have the same.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
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


# Full, over quota, over the limit of a file's size, gone bad, or read-only of a sudden.
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
