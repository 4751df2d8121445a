"""All processes of a run compare, before its first step, what must be the same for their sum to be one gradient."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from largebatch.base.errors import UserError
from largebatch.config.run import Config
from largebatch.data.identity import Identity, Place
from largebatch.data.source import Source
from largebatch.records.provenance import Run, versions
from largebatch.records.read import differences
from largebatch.runtime.world import World

# What may differ between machines: where files are, and how many cores and how much memory there are.
LOCAL = ("dataset.root", "dataset.layout", "dataset.decoder", "loader", "launcher", "threads")
NO_DIGEST = "has no digest of its data, which earlier versions did not keep: whether these are the same is not known"
_PACKAGES = ("torch", "largebatch")


def check_agreement(run: Run, source: Source, world: World) -> None:
    """Compare versions, configuration, data and decoded pixels over all processes.

    Each leaves word in the store where the processes met; rank 0 compares, and the first difference is raised by all of
    them in the same words.

    Raises:
        UserError: a process differs from rank 0; names its rank and the difference.
    """
    if world.store is None:
        return
    store, identity = world.store, source.identity
    mine = {
        "versions": {name: version for name, version in versions().items() if name in _PACKAGES},
        "configuration": _shared(run.config),
        "run": run.run_hash,
        "data": identity.to_mapping(),
        "pixels": source.pixels_digest(),
    }
    store.set(f"agreement/{world.rank}", json.dumps(mine))
    if world.main:
        verdict: dict[str, Any] = {}
        for rank in range(1, world.size):
            verdict = verdict or _compared(mine, json.loads(store.get(f"agreement/{rank}")), rank)
        store.set("agreement/verdict", json.dumps(verdict))
    verdict = json.loads(store.get("agreement/verdict"))
    if not verdict:
        return
    about = verdict.get("about")
    if about is None:
        place = Place(**verdict["place"])
        if world.rank in (0, verdict["rank"]):
            there = place.first < getattr(identity, place.split).images
            store.set(f"agreement/image/{world.rank}", identity.describe(place.split, place.first) if there else "none")
        first, other = (store.get(f"agreement/image/{rank}").decode() for rank in (0, verdict["rank"]))
        about = f"its data differ: {place.words(f'{other} there and {first} on rank 0', verdict['counts'])}"
    raise UserError(
        f"rank {verdict['rank']} does not train what rank 0 trains: {about}. All processes of a run take the "
        "same code, configuration and data."
    )


def check_same(kept: Mapping[str, Any] | None, now: Identity, where: str, otherwise: str) -> None:
    """Refuse data that are not those of a run.

    Args:
        kept: Their identity as plain values, from a checkpoint or a record; None where it has none.
        now: Of the data that are there.
        where: What errors call the run.
        otherwise: What to do where the data cannot be restored.

    Raises:
        UserError: they are other data; names the first difference.
    """
    if kept is None:
        return
    try:
        changed = Identity.from_mapping(kept).difference(now)
    except (KeyError, TypeError):
        raise UserError(f"{where}: what it recorded of its data is damaged; {otherwise}.") from None
    if changed:
        raise UserError(f"{where} was trained on other data: {changed}. Restore the data, or {otherwise}.")


def check_digest(config: Config, identity: Identity) -> None:
    """Refuse images that do not have the digest of the configuration.

    Raises:
        UserError: they do not.
    """
    given = config.dataset.digest
    if given not in (None, identity.digest):
        raise UserError(
            f"the images of dataset={config.dataset.name} have the digest {identity.digest}, and "
            f"dataset.digest={given}: restore the data, or leave dataset.digest out."
        )


def _shared(config: Config) -> dict[str, Any]:
    """Return what of a configuration all processes must have."""
    values = config.to_mapping()
    for key in LOCAL:
        group, _, name = key.rpartition(".")
        (values[group] if group else values).pop(name)
    values["dataset"].pop("digest")  # compared with the data
    return values


def _compared(mine: Mapping[str, Any], other: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return the first difference of a process from rank 0; empty where there is none."""
    for what in ("versions", "configuration"):
        changed = differences(mine[what], other[what])
        if changed:
            return {"rank": rank, "about": f"{what} (rank 0 → rank {rank}) {'; '.join(changed)}"}
    if mine["data"]["digest"] != other["data"]["digest"]:
        here, there = Identity.from_mapping(mine["data"]), Identity.from_mapping(other["data"])
        if names := here.class_difference(there, "on rank 0", "there"):
            return {"rank": rank, "about": f"its data differ: {names}"}
        place = here.place_of_difference(there)
        if place is None:
            return {"rank": rank, "about": "its data have another digest"}
        ours, theirs = (getattr(one, place.split).images for one in (here, there))
        counts = f"; {theirs:,} {place.split} images there and {ours:,} on rank 0" if ours != theirs else ""
        return {"rank": rank, "place": asdict(place), "counts": counts}
    if mine["run"] != other["run"]:
        return {"rank": rank, "about": f"the hash of its run is {other['run'][:8]} and not {mine['run'][:8]}"}
    if mine["pixels"] != other["pixels"]:
        return {"rank": rank, "about": "dataset.decoder gives other pixels there for the same images"}
    return {}
