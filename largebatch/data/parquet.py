"""ImageNet in parquet files as Hugging Face has it: a column ``image`` of bytes and path, a column ``label``."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from largebatch.base.errors import UserError, installation
from largebatch.data.files import Container, check_row_group
from largebatch.data.listing import SPLITS, Listing, Rows, scanned
from largebatch.data.tar import shown

_BUFFER = 2**20  # bytes of a file that are read at a time
_ROWS = 128  # whose images are in memory at a time


def list_parquet(files: dict[str, list[Path]]) -> Listing:
    """List parquet files, reading each image once for its size.

    Raises:
        UserError: pyarrow is not installed, a file is damaged or of other columns, or two of them name classes in
            different orders.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            f"{files['train'][0].parent} holds parquet files, which pyarrow reads: {installation('pyarrow')}"
        )
    containers: list[Container] = []
    tables, named = {}, dict[str, list[str]]()
    for split in SPLITS:
        first = len(containers)
        containers += [Container.at(path) for path in files[split]]
        parts = [(number, containers[number]) for number in range(first, len(containers))]
        rows = Rows()
        for (_, container), (found, names) in zip(parts, scanned(_scan, parts, f"indexing {split}"), strict=True):
            rows.extend(found)
            named[container.path] = names
        tables[split] = rows.table()
    return Listing(containers, _one_order(named), tables["train"], tables["val"], rows.left_out)


def _one_order(named: dict[str, list[str]]) -> list[str]:
    """Return the names of classes, which every file must number alike."""
    first = next(iter(named))
    for path, names in named.items():
        if names != named[first]:
            label = next(
                (at for at, pair in enumerate(zip(named[first], names, strict=False)) if pair[0] != pair[1]),
                min(len(named[first]), len(names)),
            )
            one, other = (f"'{shown(its[label])}'" if label < len(its) else "no name" for its in (named[first], names))
            raise UserError(
                f"{first} and {path} number their classes differently: {label} is {one} in the first and {other} in "
                "the second. Fetch both of one version of the data set, or write them anew with one order."
            )
    return named[first]


def _scan(part: tuple[int, Container]) -> tuple[Rows, list[str]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number, container = part
    rows = Rows()
    try:
        with ParquetFile(container.path, buffer_size=_BUFFER) as file:
            schema = file.schema_arrow
            if not _fits(schema):
                found = ", ".join(shown(f"{field.name} ({field.type})") for field in schema)
                raise UserError(
                    f"{container.path} has the columns {found}: what is read is one 'image', a struct of 'bytes' "
                    "(binary) and 'path' (string), and one 'label', a whole number."
                )
            for group in range(file.num_row_groups):
                check_row_group(file.metadata, group)
                table = file.read_row_group(group, columns=["image.path", "label"], use_threads=False)
                labels = table.column("label").to_pylist()
                rows_found = zip(table.column("image").to_pylist(), labels, _sizes(file, group), strict=True)
                for row, (image, label, size) in enumerate(rows_found):
                    if image is None or label is None:
                        raise UserError(f"{container.path}: row {row} of row group {group} has no image or no label.")
                    name = image["path"] or f"{group:08d}-{row:08d}"
                    rows.add(label, name, number, (group, row), -1 if size is None else size)
            return rows, _class_names(schema.metadata or {})
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{container.path} cannot be read as parquet: {reason}. Fetch it again.") from None


def _sizes(file: Any, group: int) -> Iterator[int | None]:
    """Yield the bytes of every image of a row group: parquet gives them with the images, which are read in parts."""
    from pyarrow.compute import binary_length

    parts = file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=["image.bytes"], use_threads=False)
    for part in parts:
        yield from binary_length(part.column("image").field("bytes")).to_pylist()


def _fits(schema: Any) -> bool:
    from pyarrow import types

    if any(schema.names.count(name) != 1 for name in ("image", "label")):
        return False
    image, label = schema.field("image").type, schema.field("label").type
    if not types.is_struct(image) or not types.is_integer(label):
        return False
    parts = [image.field(at) for at in range(image.num_fields)]
    allowed = {"bytes": (types.is_binary, types.is_large_binary), "path": (types.is_string, types.is_large_string)}
    return all(
        sum(part.name == name and any(fits(part.type) for fits in kinds) for part in parts) == 1
        for name, kinds in allowed.items()
    )


def _class_names(metadata: dict[bytes, bytes]) -> list[str]:
    """Return the names of the classes where Hugging Face's own metadata give them."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
