"""ImageNet in parquet files as Hugging Face has it: a column ``image`` of bytes and path, a column ``label``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from largebatch.base.errors import UserError
from largebatch.data.files import Container
from largebatch.data.listing import SPLITS, Listing, Rows, scanned


def list_parquet(files: dict[str, list[Path]]) -> Listing:
    """List parquet files, reading the columns of labels and names alone.

    Raises:
        UserError: pyarrow is not installed, or a file is damaged or of other columns.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            f"{files['train'][0].parent} holds parquet files, which pyarrow reads: pip install 'largebatch[parquet]'."
        )
    containers: list[Container] = []
    tables, classes = {}, list[str]()
    for split in SPLITS:
        first = len(containers)
        containers += [Container.at(path) for path in files[split]]
        parts = [(number, containers[number]) for number in range(first, len(containers))]
        rows = Rows()
        for found, names in scanned(_scan, parts, f"indexing {split}"):
            rows.extend(found)
            classes = classes or names
        tables[split] = rows.table()
    return Listing(containers, classes, tables["train"], tables["val"])


def _scan(part: tuple[int, Container]) -> tuple[Rows, list[str]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number, container = part
    rows = Rows()
    try:
        with ParquetFile(container.path) as file:
            schema = file.schema_arrow
            if not _fits(schema):
                raise UserError(
                    f"{container.path} has the columns {', '.join(schema.names)}: what is read is 'image', a struct of "
                    "'bytes' and 'path', and 'label', a whole number."
                )
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["image.path", "label"], use_threads=False)
                labels = table.column("label").to_pylist()
                for row, (image, label) in enumerate(zip(table.column("image").to_pylist(), labels, strict=True)):
                    if image is None or label is None:
                        raise UserError(f"{container.path}: row {row} of row group {group} has no image or no label.")
                    rows.add(label, image["path"] or f"{group:08d}-{row:08d}", number, (group, row))
            return rows, _class_names(schema.metadata or {})
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{container.path} cannot be read as parquet: {reason}. Fetch it again.") from None


def _fits(schema: Any) -> bool:
    from pyarrow import types

    if not {"image", "label"} <= {*schema.names}:
        return False
    image, label = schema.field("image").type, schema.field("label").type
    return (
        types.is_struct(image)
        and {"bytes", "path"} <= {image.field(at).name for at in range(image.num_fields)}
        and types.is_integer(label)
    )


def _class_names(metadata: dict[bytes, bytes]) -> list[str]:
    """Return the names of the classes where Hugging Face's own metadata give them."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
