"""Compose the configuration of a command with Hydra: the only module of the package that knows Hydra."""

from __future__ import annotations

import functools
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largebatch.base.errors import UserError, nearest
from largebatch.base.files import UserPath
from largebatch.bench.config import WHAT
from largebatch.cli.arguments import SWEEPING, for_hydra, is_asked_for_help
from largebatch.cli.command import Values
from largebatch.cli.reference import MANY, OWN, group_text, help_text, in_families, keys
from largebatch.config.launchers import LAUNCHERS
from largebatch.launch.manifest import Arm

if TYPE_CHECKING:
    from omegaconf import DictConfig


def configuration_directory() -> Path:
    """Return conf/: inside the package where it was installed, beside it in a checkout."""
    here = Path(__file__).resolve().parents[1]
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


@dataclass
class Composed:
    """Result of composing a command line: the values of one call, or the arms of a sweep and its directory.

    Hydra calls it, and a launcher of ours calls :meth:`sweep`. It only keeps the values: the work begins when Hydra is
    done, so that its faults are not worded by Hydra and its stack has no frame of Hydra's. Of --help and --cfg, which
    call nothing, both stay empty.
    """

    values: Values | None = None
    directory: Path = Path()
    arms: list[Arm] = field(default_factory=list)
    mistake: Exception | None = None  # raised by compose(): Hydra would print words of its own first

    def __call__(self, composed: DictConfig) -> None:
        """Keep the values of one call, as plain ones."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            self.values = typing.cast(Values, OmegaConf.to_container(composed, resolve=True))
            self.values.pop("experiment", None)
        except OmegaConfBaseException as error:
            self.mistake = error

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
    if is_asked_for_help(arguments):
        show_help(name, arguments)
        return Composed()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back to us, to be put into a sentence
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if "RANK" in os.environ and SWEEPING & {*arguments}:
        raise UserError("a sweep (-m, launcher=slurm) cannot be started in a rank: start it once, without torchrun.")
    composed = Composed()
    sys.argv = ["largebatch", *for_hydra(name, arguments, kinds())]
    try:
        hydra.main(version_base="1.3", config_path=str(configuration_directory()), config_name=name)(composed)()
        if composed.mistake:
            raise composed.mistake
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_in_a_sentence(error)) from None
    except YAMLError as error:
        raise UserError(_broken_yaml(error)) from None
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


def keep_hydra() -> Callable[[], None]:
    """Take away the configuration that another program has given to Hydra; return what puts it back."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    of_program, of_run = GlobalHydra.instance(), HydraConfig.instance()
    before = of_program.hydra, of_run.cfg
    of_program.clear()

    def put_back() -> None:
        of_program.hydra, of_run.cfg = before

    return put_back


def _broken_yaml(error: Exception) -> str:
    """Say where a file of the user's is no YAML: PyYAML knows the file, the line and what it expected there."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"a file of the configuration is no YAML: {' '.join(str(error).split())}."
    problem = getattr(error, "problem", None) or "it cannot be read"
    return f"{mark.name} is no YAML, at line {mark.line + 1}, column {mark.column + 1}: {problem}."


def _in_a_sentence(error: Exception) -> str:
    """Put what Hydra found wrong into one sentence, with the nearest key."""
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        group, _, key = found[1].rpartition(".")
        others = [name for name, kind in LAUNCHERS.items() if key in kind.__dataclass_fields__]
        if group == "launcher" and others:
            return f"{found[1]} is a key of launcher={' and '.join(others)} alone."
        return f"'{found[1]}' is not a key.{nearest(found[1], kinds())} `--help` lists them all."
    if found := re.search(r"Could not find '(.+)/([^'/]+)'\s+Available options in '.+':((?:\n\t\S+)+)", text):
        group, given, options = found[1], found[2], found[3].split()
        more = f" `--help {group}` lists all." if len(options) > MANY else ""
        return f"{group}={given} is not known: it takes {in_families(options)}.{more}{nearest(given, options)}"
    if found := re.search(r"Ambiguous value for argument '(.+)'", text):
        return f"{found[1]} is several values, and takes one: add -m to run them one after another."
    if found := re.search(r"Cannot merge DictConfig with ListConfig\s+full_key: (\S+)", f"{text} {error.__cause__}"):
        return f"{found[1]} takes a list, such as {found[1]}=[a,b]."
    override = getattr(error, "override", None)
    if override is not None:
        return (
            f"'{override}' cannot be read as key=value. Put a value with = , [ or spaces into quotes: "
            "'run_dir=\"runs/k=8\"'."
        )
    return " ".join(f"{text} {error.__cause__ or ''}".split())


@functools.cache
def kinds() -> dict[str, Any]:
    """Return the type of every key of every command, as its dataclass says."""
    found = {key: kind for command in OWN for key, (kind, _) in keys(command).items()}
    return found | {"hydra.run.dir": UserPath}


def show_help(name: str, arguments: Sequence[str]) -> None:
    """Print ``--help`` of a command, or of the group that is named after it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    conf = configuration_directory()
    named = [word for word in arguments if not word.startswith("-") and "=" not in word and word not in WHAT]
    if named:
        print(group_text(conf, named[0]))
        return
    with initialize_config_dir(version_base="1.3", config_dir=str(conf)):
        values = OmegaConf.to_container(hydra_compose(name))
    print(help_text(name, conf, typing.cast(Values, values)))
