"""Files that a command writes for people: signed in their metadata, and never written over somebody else's."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from largebatch.base.errors import UserError, nearest
from largebatch.base.files import write_atomically

SIGNATURE = "largebatch"
# How the signature stands in a file, by suffix. Text within a file cannot look like it: SVG and HTML escape their
# angle brackets, PNG and PDF compress.
SIGNED = {
    ".svg": f"<dc:title>{SIGNATURE}</dc:title>".encode(),
    ".pdf": f"/Creator ({SIGNATURE})".encode(),
    ".png": f"tEXtSoftware\0{SIGNATURE}".encode(),
    ".html": f'<meta name="generator" content="{SIGNATURE}">'.encode(),
}
FIGURES = (".svg", ".pdf", ".png")
DOTS_PER_INCH = 160  # of a PNG: two for one on a screen, and sharp on a slide


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise :class:`UserError` unless ``path`` may be written: a suffix of these, and no file of somebody else's."""
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise UserError(
            f"out={path} is no kind of file that this command writes: end it in {' or '.join(suffixes)}."
            f"{nearest(suffix, suffixes) if suffix else ''}"
        )
    try:
        directory = path.is_dir()
        foreign = path.is_file() and SIGNED[suffix] not in path.read_bytes()
    except OSError as error:  # we may not read it, or no file can have such a name
        raise UserError(f"out={path} cannot be used: {error.strerror}. Give another name.") from None
    if directory:
        raise UserError(f"out={path} is a directory: give the name of a file.")
    if foreign:
        raise UserError(
            f"out={path} exists and was not written by largebatch: move it out of the way, or give another name."
        )


def write(path: Path, content: bytes) -> None:
    """Write a file so that a reader never sees half of it, and make its directory.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"out={path} cannot be written: {error}.") from None


def encode(figure: Figure, suffix: str) -> bytes:
    """Return a figure as a file of one of ``FIGURES``: signed and undated, so that equal figures are equal files."""
    kinds: dict[str, dict[str, str | None]] = {
        ".svg": {"Creator": SIGNATURE, "Date": None},
        ".pdf": {"Creator": SIGNATURE, "CreationDate": None},
        ".png": {"Software": SIGNATURE},
    }
    buffer = BytesIO()
    figure.savefig(buffer, format=suffix[1:], dpi=DOTS_PER_INCH, metadata=kinds[suffix])
    return buffer.getvalue()
