"""Compose the configuration of a command with Hydra: the only module of the package that knows Hydra."""

from __future__ import annotations

import functools
import os
import re
import sys
import typing
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largebatch.base.errors import UserError, nearest
from largebatch.base.files import UserPath
from largebatch.bench.config import BenchConfig
from largebatch.cli.arguments import SWEEPING, for_hydra
from largebatch.cli.command import Values
from largebatch.cli.commands.probe import Asked as ProbeWords
from largebatch.config.groups import CertifyConfig
from largebatch.config.launchers import LAUNCHERS
from largebatch.config.run import Config
from largebatch.inference.config import EvalConfig
from largebatch.launch.manifest import Arm
from largebatch.quantization.config import QuantizeConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig


OTHERS = ("experiment", "format", "rates")  # keys that belong to no dataclass
MANY = 20  # options of a group, above which a sentence does not name every one


def configuration_directory() -> Path:
    """Return conf/: inside the package where it was installed, beside it in a checkout."""
    here = Path(__file__).resolve().parents[1]
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


@dataclass
class Composed:
    """What Hydra has made of a command line: the values of one call, or the arms of a sweep and its directory.

    Hydra calls it, and a launcher of ours calls :meth:`sweep`. It only keeps the values: the work begins when Hydra is
    done, so that its faults are not worded by Hydra and its stack has no frame of Hydra's. Of --help and --cfg, which
    call nothing, both stay empty.
    """

    values: Values | None = None
    directory: Path = Path()
    arms: list[Arm] = field(default_factory=list)

    def __call__(self, composed: DictConfig) -> None:
        """Keep the values of one call, as plain ones."""
        from omegaconf import OmegaConf

        self.values = typing.cast(Values, OmegaConf.to_container(composed, resolve=True))
        self.values.pop("experiment", None)

    def sweep(self, directory: Path, arms: Sequence[Arm]) -> None:
        """Keep the arms; ``directory`` is the sweep's."""
        self.directory = directory
        self.arms += arms


def compose(name: str, arguments: list[str]) -> Composed:
    """Compose the configuration of a command with Hydra.

    Args:
        name: The command, and its file in ``conf/``.
        arguments: ``key=value`` and Hydra's own options.

    Raises:
        UserError: a mistake in the arguments.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back to us, to be put into a sentence
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if "RANK" in os.environ and SWEEPING & {*arguments}:
        raise UserError("a sweep (-m, launcher=slurm) cannot be started in a rank: start it once, without torchrun.")
    composed = Composed()
    sys.argv = ["largebatch", *for_hydra(name, arguments, kinds())]
    try:
        hydra.main(version_base="1.3", config_path=str(configuration_directory()), config_name=name)(composed)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_in_a_sentence(error)) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"hydra.sweep.dir cannot be written: {error}. Give another directory.") from None
    except ValueError as error:
        if not str(error).startswith("Config group override must be"):
            raise
        raise UserError("A group such as model=… takes one of its names, not a number or a list: see --help.") from None
    sys.argv = ["largebatch", name, *arguments]  # Hydra has read its part: the record wants the whole
    return composed


def _in_a_sentence(error: Exception) -> str:
    """Put what Hydra found wrong into one sentence, with the nearest key."""
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        group, _, key = found[1].rpartition(".")
        others = [name for name, kind in LAUNCHERS.items() if key in kind.__dataclass_fields__]
        if group == "launcher" and others:
            return f"{found[1]} is a key of launcher={' and '.join(others)} alone."
        return f"'{found[1]}' is not a key.{nearest(found[1], [*kinds(), *OTHERS])} `--help` lists them all."
    if found := re.search(r"Could not find '(.+)/([^'/]+)'\s+Available options in '.+':((?:\n\t\S+)+)", text):
        group, given, options = found[1], found[2], found[3].split()
        return f"{group}={given} is not known: it takes {_in_families(options)}.{nearest(given, options)}"
    if found := re.search(r"Ambiguous value for argument '(.+)'", text):
        return f"{found[1]} is several values, and takes one: add -m to run them one after another."
    override = getattr(error, "override", None)
    if override is not None:
        return (
            f"'{override}' cannot be read as key=value. Put a value with = , [ or spaces into quotes: "
            "'run_dir=\"runs/k=8\"'."
        )
    return " ".join(f"{text} {error.__cause__ or ''}".split())


def _in_families(options: Sequence[str]) -> str:
    """List options; those that begin alike by their beginning, where there are too many for a sentence."""
    if len(options) <= MANY:
        return ", ".join(options)
    sizes = Counter(option.partition("_")[0] for option in options if "_" in option)
    families = {name for name, size in sizes.items() if size > 2}
    shown = []
    for option in options:
        family = option.partition("_")[0] if "_" in option else ""
        shown.append(f"{family}_… ({sizes[family]} of them, in --help)" if family in families else option)
    return ", ".join(dict.fromkeys(shown))


@functools.cache
def kinds() -> dict[str, Any]:
    """Return the type of every key of every command, as its dataclass says."""

    def walk(cls: type, prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, kind in typing.get_type_hints(cls, include_extras=True).items():
            found[prefix + name] = kind
            found |= walk(kind, f"{prefix}{name}.") if is_dataclass(kind) and isinstance(kind, type) else {}
        return found

    groups = {"bench.": BenchConfig, "certify.": CertifyConfig}
    found = {key: kind for prefix, cls in groups.items() for key, kind in walk(cls, prefix).items()}
    for cls in LAUNCHERS.values():
        found |= walk(cls, "launcher.")
    for whole in (QuantizeConfig, EvalConfig, ProbeWords, Config):
        found |= walk(whole, "")
    return found | {"hydra.sweep.dir": UserPath, "hydra.run.dir": UserPath}
