"""WebDataset's shards: tar archives with an image and a .cls, the number of its class, for every key."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from largebatch.base.errors import UserError
from largebatch.data.archives import reading
from largebatch.data.files import Container
from largebatch.data.listing import IMAGE_SUFFIXES, SPLITS, Listing, Rows, is_hidden, is_image, scanned
from largebatch.data.tar import Member, members, shown

_LONGEST_LABEL = 32  # bytes of a .cls


def list_shards(shards: dict[str, list[Path]]) -> Listing:
    """List the images of every split's shards.

    Raises:
        UserError: a shard is damaged, or a key lacks its image or its .cls, or has one of them twice.
    """
    containers: list[Container] = []
    tables, left_out = {}, Counter[str]()
    for split in SPLITS:
        first = len(containers)
        containers += [Container.at(path) for path in shards[split]]
        parts = [(number, containers[number]) for number in range(first, len(containers))]
        rows = Rows()
        for found in scanned(_scan, parts, f"indexing {split}"):
            rows.extend(found)
        tables[split] = rows.table()
        left_out += rows.left_out
    return Listing(containers, [], tables["train"], tables["val"], left_out)


def _scan(part: tuple[int, Container]) -> Rows:
    number, shard = part
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    strangers: dict[str, str] = {}  # by key, members that look like one of its parts and are none
    rows = Rows()
    with reading(shard.path) as read:
        for member in members(read, 0, shard.bytes, shard.path):
            folder, slash, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")  # as WebDataset cuts it: at the first dot
            key, suffix = folder + slash + key, suffix.lower()
            whole = member.regular and "." not in suffix and not is_hidden(member.name)
            if whole and is_image(f".{suffix}"):
                _only(key in images, "two images", member, key, shard.path)
                images[key] = member
            elif whole and suffix == "cls":
                _only(key in labels, "two classes", member, key, shard.path)
                labels[key] = _class(read(member.offset, min(member.size, _LONGEST_LABEL)), member, shard.path)
            else:
                rows.leave_out(member.name)
                if not is_hidden(member.name) and f".{suffix}".endswith((*IMAGE_SUFFIXES, ".cls")):
                    strangers[key] = member.name
    _check_parts(shard.path, images, labels, strangers)
    for key, member in images.items():
        rows.add(labels[key], member.name, number, (member.offset, member.size), member.size)
    return rows


def _only(another: bool, what: str, member: Member, key: str, shard: str) -> None:
    if another:
        raise UserError(
            f"{shard} holds {what} of the key '{shown(key)}', at byte {member.offset:,}: a key ends at the first dot "
            "of a name, and takes one image and one .cls."
        )


def _check_parts(shard: str, images: dict[str, Member], labels: dict[str, int], strangers: dict[str, str]) -> None:
    """Refuse a key that lacks its image or its class: the image would be left out without a word."""
    rule = "shards take one image and one .cls a key, which ends at the first dot of a name"
    for key, member in images.items():
        if key not in labels:
            raise UserError(
                f"{shard} holds '{shown(member.name)}' at byte {member.offset:,} without '{shown(key)}.cls', the "
                f"number of its class: {rule}."
            )
    for key in [*labels, *strangers]:
        if key not in images:
            found = f", but '{shown(strangers[key])}', which is no part that is read" if key in strangers else ""
            raise UserError(
                f"{shard} holds no image of the key '{shown(key)}'{found}: {rule}, and links are not followed."
            )


def _class(text: bytes, member: Member, shard: str) -> int:
    if not text.strip().isdigit():
        raise UserError(
            f"{shard}: '{shown(member.name)}' at byte {member.offset:,} does not hold the number of a class."
        )
    return int(text)
