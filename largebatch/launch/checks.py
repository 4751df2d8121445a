"""Check the networks and the data of all arms of a sweep before the first one starts; values are checked earlier."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from largebatch.base.errors import UserError
from largebatch.base.outcome import say
from largebatch.config.build import build
from largebatch.config.groups import KNOWN_BY_DIGEST, DatasetConfig
from largebatch.config.run import Config
from largebatch.launch.manifest import Arm


def _refused(arm: Arm, error: UserError) -> UserError:
    return UserError(f"nothing was started, because of the arm '{arm.words}': {error}" if arm.words else str(error))


def check_networks(arms: Sequence[Arm], here: bool) -> None:
    """Refuse networks that do not exist, or do not take the images of their arm, as ``train`` would.

    Args:
        arms: The arms; one whose values are refused is left to the plan.
        here: Whether the arms run on this machine. A machine that only submits may have no PyTorch, and takes seconds
            to import it: there, networks that are not torchvision's or timm's are left to the nodes, as are those of
            the user's own data.

    Raises:
        UserError: an arm, by name, and what is wrong with it.
    """
    seen = set[tuple[object, ...]]()
    for arm in arms:
        try:
            config = Config.from_mapping(arm.values)
        except UserError:
            continue
        data, source = config.dataset, config.model.source
        if data.source != "own" or not (here or source in ("torchvision", "timm")):
            continue
        try:
            from largebatch.data.source import sample_of
            from largebatch.models.build import check_shapes
        except ImportError:
            if here:
                raise
            return
        sample = sample_of(data)
        key = (json.dumps(arm.values["model"], sort_keys=True), data.classes, min(config.n, 2), str(sample))
        if key in seen:
            continue
        seen.add(key)
        try:
            check_shapes(config.model, data.classes or 2, (min(config.n, 2), *sample.shape), sample.dtype)
        except UserError as error:
            raise _refused(arm, error) from None


def with_digests(arms: Sequence[Arm], here: bool) -> list[Arm]:
    """Give every arm of an image folder the digest of its images, which tells it from arms of other folders.

    Args:
        arms: The arms.
        here: Whether data that are not here are a mistake; else they may be on the nodes, and each arm's digest is
            computed there.

    Raises:
        UserError: data that are not here, or cannot be used.
    """
    found: dict[str, str | None] = {}
    kept = []
    for arm in arms:
        values = arm.values["dataset"]
        key = json.dumps(values, sort_keys=True, default=str)
        if _of_files(values) and key not in found:
            try:
                found[key] = _digest(build(DatasetConfig, values, "dataset."), here)
            except UserError as error:
                raise _refused(arm, error) from None
        digest = found.get(key, values.get("digest"))
        kept.append(Arm(arm.words, {**arm.values, "dataset": {**values, "digest": digest}}))
    return kept


def _of_files(values: Mapping[str, Any]) -> bool:
    """Whether a set lies below ``dataset.root``, and is not downloaded."""
    return values.get("source") == "own" and values.get("name") in ("imagenet", "imagefolder")


def _digest(config: DatasetConfig, here: bool) -> str | None:
    """Return the digest of a set of files where it is part of the experiment, None where it is not known.

    Raises:
        UserError: the data are not here, where they should be; or those that are here cannot be used.
    """
    if not here and not (config.root and Path(config.root).expanduser().is_dir()):
        if config.root:
            say(f"dataset.root={config.root} is not on this machine: the nodes must have it.")
        return config.digest
    try:
        from largebatch.data.layouts import open_splits, with_digest
        from largebatch.data.recognise import given_root, recognise
    except ImportError:  # a machine that only submits
        return config.digest
    root = given_root(config)
    if config.name in KNOWN_BY_DIGEST:
        return with_digest(config).digest
    if root is None:
        open_splits(config)  # says what is missing
    else:
        recognise(root, config)
    return config.digest
