"""The command line: dispatch to the sub-commands, and exit statuses.

Commands import what they need when they run, so that ``--help`` and mistakes in words cost no import of torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from importlib import metadata
from typing import NoReturn

from largebatch.base.errors import Fault, UserError, installation, nearest
from largebatch.base.files import DISK_TROUBLE
from largebatch.base.outcome import FAULT, MISTAKE, Unbreakable
from largebatch.base.signals import INTERRUPTED
from largebatch.base.user_code import worded
from largebatch.bench.config import WHAT
from largebatch.cli.arguments import is_asked_for_help, verb_first
from largebatch.cli.command import Command, PlainCommand
from largebatch.cli.commands.bench import bench
from largebatch.cli.commands.certify import certify
from largebatch.cli.commands.compact import COMPACT
from largebatch.cli.commands.data import DATA
from largebatch.cli.commands.eval import evaluate
from largebatch.cli.commands.explain import explain
from largebatch.cli.commands.plot import PLOT
from largebatch.cli.commands.predict import PREDICT
from largebatch.cli.commands.probe import probe
from largebatch.cli.commands.quantize import quantize
from largebatch.cli.commands.report import REPORT
from largebatch.cli.commands.sweep import SWEEP
from largebatch.cli.commands.table import TABLE
from largebatch.cli.commands.train import train
from largebatch.cli.compose import compose
from largebatch.launch.arms import one_by_one
from largebatch.launch.sweep import sweep_arms
from largebatch.runtime.failure import tell

TRAIN = Command("train a network from k workers of n samples each, and record the run", train, sweep_arms)
COMMANDS: dict[str, Command | PlainCommand] = {
    "train": TRAIN,
    "sweep": SWEEP,
    "certify": Command("compare the trainer with the paper's definition, on several numbers of processes", certify),
    "eval": Command("evaluate runs, ensembles and weights from files, also if they don't fit on the device", evaluate),
    "probe": Command("measure the largest useful minibatch: drift, noise scale, sharpness", probe),
    "quantize": Command("convert a trained network to 8-bit integers, and report the cost", quantize),
    "explain": Command("print the plan of train: rates, iterations, parameters, placement", explain),
    "bench": Command("measure the step, the loader or the exchange on this machine, against plain PyTorch", bench),
    "predict": PREDICT,
    "data": DATA,
    "table": TABLE,
    "plot": PLOT,
    "report": REPORT,
    "compact": COMPACT,
}


def main() -> NoReturn:
    """Run the command line, and exit with its status."""
    sys.stderr = Unbreakable.of(sys.stderr)
    try:
        with worded():
            status = run(sys.argv[1:])
    except UserError as error:
        tell(f"largebatch: {error}")
        status = MISTAKE
    except Fault as error:
        tell(f"largebatch: {error}")
        status = FAULT
    except ImportError as error:
        if not _is_torchs(error):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        command = installation("torch", "torchvision")
        tell(f"largebatch: PyTorch cannot be imported here: {reason}. Install it again: {command}")
        status = FAULT
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has left, as head does
            sys.stdout = None
        elif error.errno in DISK_TROUBLE:
            tell(f"largebatch: a disk failed: {error}. Make room, or use a directory that can be written.")
        else:
            raise
        status = FAULT
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)


def _is_torchs(error: ImportError) -> bool:
    """Whether PyTorch is missing, or lacks one of its libraries."""
    package = (error.name or "").partition(".")[0]
    return package in ("torch", "torchvision") or any(name in str(error) for name in ("libtorch", "libc10", "libcud"))


def run(arguments: list[str]) -> int:
    """Run one command line, without the program's name, and return its exit status.

    Raises:
        UserError: a mistake in it.
    """
    if {"-sc", "--shell-completion"} & {*arguments}:
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
    composed = compose(name, _named_part(rest) if name == "bench" and not is_asked_for_help(rest) else rest)
    if composed.arms and command.sweep:
        return command.sweep(composed.directory, composed.arms)
    if composed.arms:
        return one_by_one(command.run, composed.arms)
    return command.run(composed.values).status if composed.values is not None else 0


def _named_part(arguments: list[str]) -> list[str]:
    """Turn a word after ``bench`` into its value: ``bench step`` is bench.what=step."""
    word, *rest = verb_first(arguments) or [""]
    if "=" in word or word[:1] in ("-", "+", "~", ""):
        return arguments
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


def _complete(arguments: list[str]) -> int:
    """Answer the shell: names of commands first, then Hydra's completion of that command's keys."""
    words = [word for word in arguments if word not in ("-sc", "--shell-completion", *COMMANDS)]
    asked = re.fullmatch("(install|uninstall|query)=(bash|fish|zsh)", " ".join(words))
    if asked is None:
        raise UserError(
            '-sc takes install=bash (or fish, zsh), or uninstall=bash: eval "$(largebatch -sc install=bash)"'
        )
    if asked[1] != "query":
        compose("train", ["-sc", *words])
        return 0
    program, _, rest = os.environ.get("COMP_LINE", "").partition(" ")
    name, space, line = rest.lstrip().partition(" ")
    if not space:
        print(" ".join(command for command in COMMANDS if command.startswith(name)))
    elif isinstance(COMMANDS.get(name), Command):
        os.environ["COMP_LINE"] = f"{program} {line}"
        with contextlib.suppress(UserError):  # the line is not finished: a mistake in it is not to be shown yet
            compose(name, ["-sc", *words])
    return 0
