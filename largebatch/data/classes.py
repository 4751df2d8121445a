"""The classes of a data set: their names, and whether both splits have images of all of them."""

from __future__ import annotations

import functools
import re

import numpy as np

from largebatch.base.errors import UserError
from largebatch.config.groups import DatasetConfig
from largebatch.data.files import Split
from largebatch.data.folders import some
from largebatch.data.listing import Listing
from largebatch.data.tar import shown

_SYNSET = re.compile(r"n\d{8}(?=_)")  # at the start of a training image's name


def class_names(config: DatasetConfig, where: str, listing: Listing) -> list[str]:
    """Return the classes by label.

    Shards and parquet files number classes: ImageNet's by sorted synsets.

    Raises:
        UserError: there are more labels than names, or (``imagenet``) the names or files are of another order, or
            nothing names them.
    """
    highest = max((int(table.labels.max()) for table in (listing.train, listing.val) if len(table)), default=-1)
    if listing.classes and highest >= len(listing.classes):
        raise UserError(
            f"dataset={config.name}: {where} go up to class {highest}, but name only {len(listing.classes)} classes: "
            "labels are counted from 0."
        )
    if config.name != "imagenet":
        return listing.classes or [str(label) for label in range(highest + 1)]
    synsets = sorted(_official_names())
    if highest >= len(synsets):
        raise UserError(
            f"dataset=imagenet: {where} go up to class {highest}, and ImageNet-1k's are 0 … 999, counted from 0."
        )
    if listing.classes:
        _check_names(where, listing.classes, synsets)
    if not _check_file_names(where, listing, synsets) and not listing.classes:
        raise UserError(
            f"dataset=imagenet: {where} name neither classes nor images after ImageNet's synsets, so that nothing "
            "shows whether labels are numbered in that order. dataset=imagefolder takes them as they are."
        )
    return synsets


@functools.cache
def _official_names() -> dict[str, list[str]]:
    """Return, for every synset of ImageNet-1k, the names of its class in lower case."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    synsets = info.label_names()  # type: ignore[no-untyped-call]
    return {synset: info.label_name_to_description(synset).lower().split(", ") for synset in synsets}


def _check_names(where: str, names: list[str], synsets: list[str]) -> None:
    official = _official_names()
    if len(names) != len(synsets):
        raise UserError(f"dataset=imagenet: {where} name {len(names)} classes, and ImageNet-1k has {len(synsets)}.")
    for label, (name, synset) in enumerate(zip(names, synsets, strict=True)):
        if name != synset and not name.lower().replace("_", " ").startswith(tuple(official[synset])):
            raise UserError(
                f"dataset=imagenet: {where} call class {label} '{shown(name)}', which is {synset}, "
                f"'{official[synset][0]}', where classes are numbered in the order of their synsets: make them anew "
                "with that order, or use dataset=imagefolder."
            )


def _check_file_names(where: str, listing: Listing, synsets: list[str]) -> bool:
    """Hold the first image of each class against the synset in its name; return whether any has one."""
    named = False
    for table in (listing.train, listing.val):
        for at in np.unique(table.labels, return_index=True)[1]:
            label, name = int(table.labels[at]), table.names[int(at)]
            synset = _SYNSET.match(name)
            named |= synset is not None
            if synset and synset[0] != synsets[label]:
                raise UserError(
                    f"dataset=imagenet: {where} give {shown(name)} the class {label}, which is {synsets[label]} where "
                    "classes are numbered in the order of their synsets: make them anew with that order."
                )
    return named


def check_sets(config: DatasetConfig, where: str, train: Split, val: Split, partial: bool) -> None:
    """Check both splits against each other and against what the configuration says of them.

    Args:
        config: How many images and classes there must be.
        where: What errors call the data set.
        train: Training images.
        val: Validation images.
        partial: Whether classes may lack images, because directories could not be read.

    Raises:
        UserError: classes that differ, or lack images in one of the splits; other numbers than were given.
    """
    about = f"dataset={config.name}: {where}"
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        raise UserError(
            f"{about}: train/ and val/ do not have the same class folders: {some(only_train)} only in train, "
            f"{some(only_val)} only in val."
        )
    if config.name == "imagenet" and set(train.classes) != _official_names().keys():
        synsets = set(_official_names())
        raise UserError(
            f"{about} do not have ImageNet-1k's 1000 synsets, n01440764 … n15075141, as classes: "
            f"{some(sorted(synsets - set(train.classes)))} lacking, {some(sorted(set(train.classes) - synsets))} "
            "unknown. For other images use dataset=imagefolder."
        )
    if config.classes not in (None, len(train.classes)):
        raise UserError(f"dataset.classes={config.classes}, but {where} have {len(train.classes)} classes.")
    for name, split, expected in (("train", train, config.train_images), ("val", val, config.val_images)):
        if expected not in (None, len(split)):
            raise UserError(
                f"dataset.{name}_images={expected}, but {where} hold {len(split)} {name} images: complete the copy, or "
                f"use dataset.{name}_images=null to take what is there."
            )
        if not len(split):
            raise UserError(f"{about} hold no {name} images: fetch them again.")
    if not partial:
        _check_counts(about, train, val)


def _check_counts(about: str, train: Split, val: Split) -> None:
    splits = {"train": train, "val": val}
    counts = {name: np.bincount(split.labels, minlength=len(split.classes)) for name, split in splits.items()}
    from_one = all(its[0] == 0 and its[1:].all() for its in counts.values())
    for name, other in (("train", "val"), ("val", "train")):
        empty = counts[name] == 0
        if empty.any():
            classes = some([train.classes[label] for label in np.flatnonzero(empty)])
            there = f", of which there are {other} images" if counts[other][empty].any() else ""
            hint = "labels are counted from 0, and these start at 1" if from_one else "complete the copy"
            raise UserError(f"{about} hold no {name} images of the classes {classes}{there}: {hint}.")
