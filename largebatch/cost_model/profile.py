"""Read and check profiles of machines: time of a pass, speed of gradients and images. Nothing imports torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from largebatch.base.errors import UserError, at_least, nearest, one_of
from largebatch.config.build import build

SHIPPED = Path(__file__).parent / "profiles"
SCHEMA = 1


@dataclass(frozen=True)
class Pass:
    """Forward and backward through the network, of ``workers`` · n images at once on one GPU.

    ``mean_ms`` and ``std_ms`` are over many such passes, ``backward_ms`` is the part of the mean in which gradients
    appear. ``steps_ms`` are the measured steps of one pass and an update each, empty where they are not known.
    """

    workers: int
    mean_ms: float
    std_ms: float
    backward_ms: float
    steps_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        at_least("passes.workers", self.workers, 1)
        at_least("passes.std_ms", self.std_ms, 0)
        if not 0 < self.backward_ms < self.mean_ms:
            raise UserError(
                f"passes.backward_ms={self.backward_ms:g} is not a part of passes.mean_ms={self.mean_ms:g}: it takes a "
                "number above 0 and below that."
            )


@dataclass(frozen=True)
class Link:
    """Link between the GPUs of a node, or between nodes: a message of b bytes takes α + bβ.

    ``latency_us`` is α, and ``gbit_per_second`` is 8/β/10⁹, in each direction at once: a GPU's where it is between
    ``gpus``, a node's where it is between ``nodes``.
    """

    between: str
    latency_us: float
    gbit_per_second: float

    def __post_init__(self) -> None:
        one_of("links.between", self.between, ("gpus", "nodes"))
        at_least("links.latency_us", self.latency_us, 0)
        if not self.gbit_per_second > 0:
            raise UserError(f"links.gbit_per_second={self.gbit_per_second:g} is no speed: it takes a number above 0.")

    def seconds(self, size: float) -> float:
        """Return the time of one message of ``size`` bytes, in s."""
        return 1e-6 * self.latency_us + 8 * size / (1e9 * self.gbit_per_second)


@dataclass(frozen=True)
class Profile:
    """A network on a machine.

    Attributes:
        schema: Of this file.
        source: Where the numbers come from.
        machine: What they were measured on and how busy that was.
        device: Of one process: a GPU, or a processor's cores.
        model: The network's name.
        images: Channels × height × width.
        precision: fp32, tf32, bf16 or fp64.
        n: Samples a worker takes.
        train_images: In an epoch.
        val_images: Evaluated after each.
        passes: For every number of workers a pass that was measured.
        update_ms: The optimizer's part of a step.
        gradient_bytes: Of all gradients, as they travel.
        messages: In how many equal parts they do: DDP's buckets, or one for every tensor.
        overlap: Which share of what could be hidden behind back-propagation is; 1 where the exchange needs nothing
            that computing needs too.
        loading_images_per_second: That a GPU's share of the processor loads meanwhile; null where nothing is loaded,
            or within the pass itself.
        gpus_per_node: How many a node has.
        links: Between the GPUs of a node, and between nodes.
    """

    schema: int
    source: str
    machine: str
    device: str
    model: str
    images: str
    precision: str
    n: int
    train_images: int
    val_images: int
    passes: tuple[Pass, ...]
    update_ms: float
    gradient_bytes: int
    messages: int
    overlap: float
    loading_images_per_second: float | None
    gpus_per_node: int
    links: tuple[Link, ...]

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise UserError(f"schema={self.schema} is not known: this version reads {SCHEMA}. Measure it again.")
        for key in ("n", "train_images", "gradient_bytes", "messages", "gpus_per_node"):
            at_least(key, getattr(self, key), 1)
        for key in ("val_images", "update_ms"):
            at_least(key, getattr(self, key), 0)
        if not 0 <= self.overlap <= 1:
            raise UserError(f"overlap={self.overlap:g} is no share: it takes 0 to 1.")
        if self.loading_images_per_second is not None and not self.loading_images_per_second > 0:
            raise UserError(
                f"loading_images_per_second={self.loading_images_per_second:g} is no speed: it takes a number above 0, "
                "or null where nothing is loaded."
            )
        for what, names in (
            ("passes", [one.workers for one in self.passes]),
            ("links", [one.between for one in self.links]),
        ):
            if len(set(names)) < len(names):
                raise UserError(f"{what} has {listed_words(names)} twice: it takes each once.")
        if 1 not in {one.workers for one in self.passes}:
            raise UserError("passes has none of one worker: it takes that, and any others.")

    def pass_for(self, workers: int) -> Pass:
        """Return the largest pass that was measured whose workers divide those of a GPU."""
        return max((one for one in self.passes if workers % one.workers == 0), key=lambda one: one.workers)

    def link(self, between: str) -> Link | None:
        """Return the link between ``gpus`` or ``nodes``, or None where it is not known."""
        return next((one for one in self.links if one.between == between), None)

    def with_link(self, link: Link) -> Profile:
        """Return this profile with another link in the place of its own."""
        return replace(self, links=(*(one for one in self.links if one.between != link.between), link))


def listed_words(names: Sequence[Any]) -> str:
    """Return names as people write them in a sentence."""
    return ", ".join(map(str, names))


def shipped() -> list[str]:
    """Return the names of the profiles that come along."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def load(name: str) -> Profile:
    """Return a profile by the name of one that comes along, or from a file.

    Raises:
        UserError: there is none, or it is not a profile: what is wrong with it.
    """
    path = Path(name) if "/" in name or name.endswith(".json") else SHIPPED / f"{name}.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"profile={name} is neither a file nor one of {listed_words(shipped())}.{nearest(name, shipped())} "
            "`largebatch bench profile format=json > my.json` measures one here."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"profile={name} cannot be read as JSON: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(f"profile={name} is not a profile: it takes what `bench profile format=json` prints.")
    try:
        return build(Profile, values)
    except UserError as error:
        raise UserError(f"profile={name}: {error}") from None


def check_is_of(
    profile: Profile, name: str, model: str | None = None, device: str | None = None, n: int | None = None
) -> None:
    """Refuse a profile of another network, device (a part of its name is enough) or n than is wanted; None is any.

    Raises:
        UserError: what it is of instead.
    """
    if model not in (None, profile.model) or (device or "").casefold() not in profile.device.casefold():
        raise UserError(
            f"{' on '.join(filter(None, (model, device)))} is wanted, but profile={name} is of {profile.model} on "
            f"{profile.device}. Measure one with `largebatch bench profile`."
        )
    if n not in (None, profile.n):
        raise UserError(
            f"n={n} is wanted, but profile={name} was measured with n={profile.n}, and how a pass's time depends on n "
            f"is not known. Measure one with `largebatch bench profile n={n}`."
        )


def missing_link(between: str, gpus: int, nodes: int) -> UserError:
    """Return what to say where a link is needed that the profile does not have."""
    words = {"nodes": "network=… and latency=…", "gpus": "gpu_link=… and gpu_latency=…"}[between]
    what = {"nodes": "between nodes", "gpus": "between the GPUs of a node"}[between]
    return UserError(
        f"{gpus} GPUs on {nodes} node{'s' * (nodes > 1)} exchange gradients {what}, but the profile says nothing of "
        f"that link: give {words}, or measure it."
    )
