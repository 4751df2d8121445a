"""The command line: the one place that knows Hydra.

sub-command → composed configuration → typed configuration → function. Commands import what they need when they
run, so that ``--help`` and mistakes in words cost no import of torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from largebatch.bench.config import WHAT, BenchConfig
from largebatch.commands.arms import one_by_one
from largebatch.commands.bench import bench
from largebatch.commands.certify import certify
from largebatch.commands.compact import COMPACT
from largebatch.commands.data import DATA
from largebatch.commands.eval import evaluate, quoted
from largebatch.commands.explain import explain
from largebatch.commands.outcome import FAULT, MISTAKE, Call, Command, PlainCommand, Values, say
from largebatch.commands.plot import PLOT
from largebatch.commands.predict import PREDICT
from largebatch.commands.probe import probe
from largebatch.commands.quantize import quantize
from largebatch.commands.report import REPORT
from largebatch.commands.run_sweep import sweep_arms
from largebatch.commands.sweep import SWEEP
from largebatch.commands.table import TABLE
from largebatch.commands.train import train
from largebatch.compress.config import QuantizeConfig
from largebatch.config import LAUNCHERS, CertifyConfig, Config, Fault, UserError, nearest
from largebatch.evaluation.config import EvalConfig
from largebatch.interrupt import INTERRUPTED
from largebatch.record import DISK_TROUBLE
from largebatch.sweep.manifest import Arm

if TYPE_CHECKING:
    from omegaconf import DictConfig


MANY = 20  # options of a group, above which a sentence does not name every one


def configuration_directory() -> Path:
    """Return conf/: inside the package where it was installed, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


TRAIN = Command("train a network from k workers of n samples each, and record the run", train, sweep_arms)
COMMANDS: dict[str, Command | PlainCommand] = {
    "train": TRAIN,
    "sweep": SWEEP,
    "certify": Command("prove that k workers are k workers, on any number of processes", certify),
    "eval": Command("evaluate runs, ensembles and weights from files, also in less memory than they take", evaluate),
    "probe": Command("measure how large a minibatch a task bears: drift, noise scale, sharpness", probe),
    "quantize": Command("make a network of 8-bit integers of a trained one, and say what that costs", quantize),
    "explain": Command("say what train would do: rates, iterations, parameters, placement", explain),
    "bench": Command("measure the step, the loader or the exchange here, beside plain PyTorch", bench),
    "predict": PREDICT,
    "data": DATA,
    "table": TABLE,
    "plot": PLOT,
    "report": REPORT,
    "compact": COMPACT,
}


def main() -> NoReturn:
    """Run the command line, and exit with its status."""
    try:
        status = run(sys.argv[1:])
    except UserError as error:
        say(f"largebatch: {error}")
        status = MISTAKE
    except Fault as error:
        say(f"largebatch: {error}")
        status = FAULT
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has left, as head does
            sys.stdout = None
        elif error.errno in DISK_TROUBLE:
            say(f"largebatch: a disk failed: {error}. Make room, or use a directory that can be written.")
        else:
            raise
        status = FAULT
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run one command line, without the program's name, and return its exit status.

    Raises:
        UserError: a mistake in it.
    """
    if _asks_for_completion(arguments):
        return _complete(arguments)
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0
    if "--version" in arguments:
        print(f"largebatch {metadata.version('largebatch')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        known = [*COMMANDS, "--help", "--version"]
        raise UserError(f"'{name}' is not a command. These are: {', '.join(COMMANDS)}.{nearest(name, known)}")
    command = COMMANDS[name]
    if isinstance(command, PlainCommand):
        return command.run(rest)
    before = {"bench": _named_part, "eval": quoted, "probe": quoted, "quantize": quoted}.get(name, list)
    return compose(name, command, before(rest))


def _named_part(arguments: list[str]) -> list[str]:
    """Turn a word after ``bench`` into its value: ``bench step`` is bench.what=step."""
    if not arguments or "=" in arguments[0] or arguments[0].startswith(("-", "+", "~")):
        return arguments
    word, *rest = arguments
    if word not in WHAT:
        raise UserError(f"bench {word} is not known: it measures {', '.join(WHAT)}.{nearest(word, WHAT)}")
    # The customary 100 MB of gradients or weights, unless a network was named.
    usual = {
        "exchange": ["model=resnet50"],
        # Images of their own size for ImageNet's networks, CIFAR's for others.
        "step": ["dataset=synthetic"] if {"model=resnet50", "model=resnet101"} & set(rest) else [],
        "offload": ["model=resnet50", "dataset=synthetic"],
        # With γ = 0 in its last BatchNorm, as training begins, the branch of a block would be 0 throughout.
        "quantize": ["model=resnet50", "model.zero_gamma=false", "bench.batches=[16,32]"],
        "profile": ["model=resnet50", "dataset=imagenet", "bench.repeats=50"],
    }.get(word, [])
    named = {argument.partition("=")[0] for argument in rest}
    return [f"bench.what={word}", *(group for group in usual if group.partition("=")[0] not in named), *rest]


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "largebatch: honest, reproducible large-minibatch training. k is the experiment, the hardware is not.",
            "",
            "largebatch COMMAND [key=value …]",
            "",
            *lines,
            "",
            "largebatch COMMAND --help lists its keys. Start with: largebatch train",
            'Completion in bash: eval "$(largebatch -sc install=bash)"',
        ]
    )


class _Application:
    """What Hydra calls: once, or through a launcher of ours once for all arms of a sweep."""

    def __init__(self, command: Command, arguments: list[str]) -> None:
        self.command, self.arguments = command, arguments
        self.status = 0  # of --help and --cfg, which call nothing
        self.fault: Exception | None = None  # raised again by compose(): here Hydra would word it first

    def __call__(self, composed: DictConfig) -> None:
        self._do(lambda: self.command.run(Call(self._plain(composed))).status)

    def sweep(self, directory: Path, arms: Sequence[Arm]) -> None:
        """Run or submit the arms; ``directory`` is the sweep's."""
        command = self.command
        self._do(lambda: command.sweep(directory, arms) if command.sweep else one_by_one(command, arms))

    def _plain(self, composed: DictConfig) -> Values:
        from omegaconf import OmegaConf

        values = typing.cast(Values, OmegaConf.to_container(composed, resolve=True))
        values.pop("experiment", None)
        return values

    def _do(self, work: Callable[[], int]) -> None:
        sys.argv = ["largebatch", *self.arguments]  # Hydra has read its part: the record wants the whole
        try:
            self.status = work()
        except Exception as error:
            self.fault = error


def compose(name: str, command: Command, arguments: list[str]) -> int:
    """Compose the configuration of a command with Hydra, and run it once, or once for every arm of a sweep."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back to us, to be put into a sentence
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if "RANK" in os.environ and {"-m", "--multirun", "hydra.mode=MULTIRUN", "launcher=slurm"} & set(arguments):
        raise UserError("a sweep (-m, launcher=slurm) cannot be started in a rank: start it once, without torchrun.")
    application = _Application(command, [name, *arguments])
    sys.argv = ["largebatch", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(configuration_directory()), config_name=name)(application)()
        if application.fault:
            raise application.fault
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_in_a_sentence(error)) from None
    except OSError as error:
        if error is application.fault or isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"hydra.sweep.dir cannot be written: {error}. Give another directory.") from None
    except ValueError as error:
        if not str(error).startswith("Config group override must be"):
            raise
        raise UserError("A group such as model=… takes one of its names, not a number or a list: see --help.") from None
    return application.status


def _in_a_sentence(error: Exception) -> str:
    """Put what Hydra found wrong into one sentence, with the nearest key."""
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        group, _, key = found[1].rpartition(".")
        others = [name for name, kind in LAUNCHERS.items() if key in kind.__dataclass_fields__]
        if group == "launcher" and others:
            return f"{found[1]} is a key of launcher={' and '.join(others)} alone."
        return f"'{found[1]}' is not a key.{nearest(found[1], _keys())} `--help` lists them all."
    if found := re.search(r"Could not find '(.+)/([^'/]+)'\s+Available options in '.+':((?:\n\t\S+)+)", text):
        group, given, options = found[1], found[2], found[3].split()
        return f"{group}={given} is not known: it takes {_in_families(options)}.{nearest(given, options)}"
    if found := re.search(r"Ambiguous value for argument '(.+)'", text):
        return f"{found[1]} is several values: add -m to run one after another, or write a list as [1,2]."
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


def _keys() -> list[str]:
    def walk(cls: type, prefix: str) -> list[str]:
        keys = []
        for name, kind in typing.get_type_hints(cls).items():
            keys.append(prefix + name)
            keys += walk(kind, f"{prefix}{name}.") if is_dataclass(kind) and isinstance(kind, type) else []
        return keys

    groups = {"": EvalConfig, "bench.": BenchConfig, "certify.": CertifyConfig}
    keys = [key for prefix, cls in groups.items() for key in walk(cls, prefix)] + walk(QuantizeConfig, "")
    keys += [key for cls in LAUNCHERS.values() for key in walk(cls, "launcher.")]
    return [*walk(Config, ""), *keys, "experiment", "format", "answer", "baseline", "margin"]


def _asks_for_completion(arguments: list[str]) -> bool:
    return any(word in ("-sc", "--shell-completion") for word in arguments)


def _complete(arguments: list[str]) -> int:
    """Answer the shell: names of commands first, then Hydra's completion of that command's keys."""
    words = [word for word in arguments if word not in ("-sc", "--shell-completion", *COMMANDS)]
    asked = re.fullmatch("(install|uninstall|query)=(bash|fish|zsh)", " ".join(words))
    if asked is None:
        raise UserError(
            '-sc takes install=bash (or fish, zsh), or uninstall=bash: eval "$(largebatch -sc install=bash)"'
        )
    if asked[1] != "query":
        return compose("train", TRAIN, ["-sc", *words])
    program, _, rest = os.environ.get("COMP_LINE", "").partition(" ")
    name, space, line = rest.lstrip().partition(" ")
    if not space:
        print(" ".join(command for command in COMMANDS if command.startswith(name)))
    elif isinstance(command := COMMANDS.get(name), Command):
        os.environ["COMP_LINE"] = f"{program} {line}"
        with contextlib.suppress(UserError):  # the line is not finished: a mistake in it is not to be shown yet
            compose(name, command, ["-sc", *words])
    return 0
