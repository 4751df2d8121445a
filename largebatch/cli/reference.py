"""Generate ``--help`` of the commands that Hydra composes: text, groups of ``conf/``, keys of the dataclasses."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from largebatch.base.errors import UserError, nearest
from largebatch.base.files import UserPath
from largebatch.bench.config import BenchConfig
from largebatch.cli.commands.probe import Asked as ProbeWords
from largebatch.config.groups import CertifyConfig
from largebatch.config.launchers import LAUNCHERS
from largebatch.config.run import Config
from largebatch.inference.config import EvalConfig
from largebatch.quantization.config import QuantizeConfig
from largebatch.records.check import flat

WIDTH = 120  # columns
MANY = 20  # options of a group, above which a sentence does not name every one
# The dataclasses of each command's own keys, besides those of a run, and what stands before the keys.
OWN: Mapping[str, tuple[str, type]] = {
    "bench": ("bench.", BenchConfig),
    "certify": ("certify.", CertifyConfig),
    "eval": ("", EvalConfig),
    "probe": ("", ProbeWords),
    "quantize": ("", QuantizeConfig),
}
OTHERS = {  # keys that belong to no dataclass
    "format": "text or json.",
    "rates": "table, or full for every iteration (with format=json).",
    "experiment": "A file of conf/experiment, or of experiment/ in --config-dir.",
    "hydra.sweep.dir": "Directory of a sweep (-m). Complete runs of an earlier sweep in it are left alone.",
}


def walk(cls: type, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Return type and description of every key of a dataclass, and of the groups in it; a group has none of its own."""
    found: dict[str, tuple[Any, str]] = {}
    said = described(cls)
    for name, kind in typing.get_type_hints(cls, include_extras=True).items():
        group = isinstance(kind, type) and is_dataclass(kind)
        found[prefix + name] = kind, said.get(name, "")
        found |= walk(kind, f"{prefix}{name}.") if group else {}
    return found


def described(cls: type) -> dict[str, str]:
    """Return what the docstrings of a dataclass, and of those it inherits from, say of each key."""
    found = {}
    for one in reversed(cls.__mro__):
        _, _, text = (inspect.cleandoc(one.__doc__ or "")).partition("Attributes:\n")
        block = text.partition("\n\n")[0]
        for name, words in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", block, re.MULTILINE):
            found[name] = " ".join(words.split())
    return found


def keys(command: str) -> dict[str, tuple[Any, str]]:
    """Return type and description of every key that a command takes."""
    own = walk(OWN[command][1], OWN[command][0]) if command in OWN else {}
    launchers: dict[str, tuple[Any, str]] = {}
    for cls in LAUNCHERS.values():
        launchers |= walk(cls, "launcher.")
    others = {key: (UserPath if key.endswith("dir") else str, text) for key, text in OTHERS.items()}
    return {**launchers, **walk(Config), **others, **own}


def help_text(command: str, conf: Path, values: Mapping[str, Any]) -> str:
    """Return ``--help`` of a command.

    Args:
        command: Its name.
        conf: The directory of its groups.
        values: Its composed configuration.
    """
    text = Path(__file__).with_name("help").joinpath(f"{command}.txt").read_text(encoding="utf-8").rstrip("\n")
    body, _, statuses = text.rpartition("\n\n")
    lines = [body, "", "== Groups (group=option; --help GROUP describes its options) =="]
    for group in groups(conf):
        lines += textwrap.wrap(f"{group}: {in_families(options(conf, group))}", WIDTH, subsequent_indent="  ")
    known, shown = keys(command), flat(values)
    lines += ["", "== Keys (key=value, with their default values) =="]
    for key, value in shown.items():
        if key != "given" and (key in known or key.rpartition(".")[2] in OTHERS):
            lines += _line(f"{key}={_written(value)}", known[key][1])
    slurm = {key: words for key, words in walk(LAUNCHERS["slurm"], "launcher.").items() if key not in shown}
    lines += ["", "== Further keys of launcher=slurm =="]
    for key, (_, said) in slurm.items():
        lines += _line(f"{key}=", said)
    lines += ["", *_line("hydra.sweep.dir=", OTHERS["hydra.sweep.dir"])]
    lists = "Lists: a,b or [a,b]; nothing: null; ~ in front of a path is the home directory; flags stand anywhere."
    return "\n".join([*lines, "", lists, *statuses.splitlines()])


def group_text(conf: Path, group: str) -> str:
    """Return the options of a group, each with the first line of its file that says what it is."""
    if group not in groups(conf):
        known = ", ".join(groups(conf))
        raise UserError(f"'{group}' is not a group: --help GROUP takes {known}.{nearest(group, groups(conf))}")
    names = options(conf, group)
    width = max(map(len, names))
    lines = []
    for name in names:
        text = (conf / group / f"{name}.yaml").read_text(encoding="utf-8")
        heads = [line[2:] for line in text.splitlines() if line.startswith("# ") and "@package" not in line]
        lines.append(f"{group}={name:<{width}}  {(heads or [''])[0]}".rstrip())
    return "\n".join(lines)


def groups(conf: Path) -> list[str]:
    """Return the groups that a user chooses from."""
    return sorted(path.name for path in conf.iterdir() if path.is_dir() and path.name != "hydra")


def options(conf: Path, group: str) -> list[str]:
    """Return the options of a group."""
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def in_families(names: Sequence[str]) -> str:
    """List options; those that begin alike by their beginning, where there are too many for a sentence."""
    if len(names) <= MANY:
        return ", ".join(names)
    sizes = Counter(name.partition("_")[0] for name in names if "_" in name)
    shown = []
    for name in names:
        family = name.partition("_")[0] if "_" in name else ""
        shown.append(f"{family}_… ({sizes[family]} of them)" if sizes[family] > 2 else name)
    return ", ".join(dict.fromkeys(shown))


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace(" ", "")


def _line(start: str, words: str) -> list[str]:
    indent = " " * 37
    lines = textwrap.wrap(words or "–", WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    if len(start) > 34:
        return [f"  {start}", *lines]
    return [f"  {start:<34} {lines[0].lstrip()}", *lines[1:]]
