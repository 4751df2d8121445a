"""The command line: the one place that knows Hydra.

sub-command → composed configuration → typed configuration → function. Commands import what they need when they
run, so that ``--help`` and mistakes in words cost no import of torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from largebatch.bench.config import WHAT, BenchConfig
from largebatch.config import CertifyConfig, Config, Fault, UserError, build, nearest, one_of
from largebatch.interrupt import ENDED, INTERRUPTED
from largebatch.placement import Placement, place
from largebatch.record import (
    default_directory,
    describe,
    differences,
    finite,
    holds_run,
    read_provenance,
    read_summary,
    safe_name,
    write_summary,
)

FAULT, MISTAKE, DIVERGED = 1, 2, 3
STATUS = {"done": 0, "stopped": 0, "diverged": DIVERGED, "failed": FAULT}

Values = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of a command: composed values, and the sweep's directory where it is an arm of one."""

    values: Values
    sweep: Path | None


@dataclass(frozen=True)
class Outcome:
    """What a call came to: exit status, and where there is one the run's directory and summary."""

    status: int
    directory: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A sub-command: its line in the list, and what it does for one call."""

    summary: str
    run: Callable[[Call], Outcome]


def configuration_directory() -> Path:
    """Return conf/: inside the package where it was installed, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def train(call: Call) -> Outcome:
    """Train one run."""
    config = Config.from_mapping(call.values)
    from largebatch.launch import Stopped, launch
    from largebatch.world import hardware, started_outside

    placement = place(config, hardware(), *started_outside())
    directory = Path(config.run_dir or default_directory(config, placement.precision, call.sweep))
    over = _run_is_over(config, placement, directory)
    if over:
        error = over["final_error"]
        shown = "" if error is None else f" (error {error:.2f} %)"
        _say(f"{over['status']} already: {directory}{shown}. Nothing was changed.")
        return Outcome(STATUS[over["status"]], str(directory), over)
    from largebatch.train import fit

    try:
        summary = launch(fit, (config, placement, directory), placement.processes, placement.threads)
    except Stopped as stop:
        summary = read_summary(directory) or {}
        if summary.get("status") in (None, "running", "failed"):  # its processes were not in the loop yet, or slow
            summary = {**summary, "status": "interrupted", "signal": stop.signal}
            if directory.is_dir():
                write_summary(directory, summary)
    except BaseException as error:
        _note_failure(directory, error)
        raise
    if summary["status"] == "interrupted":
        return Outcome(INTERRUPTED if summary["signal"] == "SIGINT" else ENDED, str(directory), summary)
    return Outcome(STATUS[summary["status"]], str(directory), summary)


def _run_is_over(config: Config, placement: Placement, directory: Path) -> dict[str, Any] | None:
    """Return the summary of a run that has nothing left to do, or None where there is something to train.

    Raises:
        UserError: the directory holds a run that was not asked for.
    """
    if not holds_run(directory):
        return None
    summary = read_summary(directory) or {"status": "running"}
    if not config.resume:
        raise UserError(
            f"run_dir={directory} holds a run already (status {summary['status']}): use resume=true to go on with "
            "it, or another run_dir."
        )
    before = read_provenance(directory) or {}
    now = {**config.experiment(placement.precision), "seed": config.seed}
    changed = differences({**before.get("experiment", {}), "seed": before.get("seed")}, now)
    if changed:
        raise UserError(
            f"run_dir={directory} holds another experiment, so it cannot be resumed as this one: "
            f"{'; '.join(changed)}. Use another run_dir."
        )
    wanted = min(config.iterations or math.inf, summary.get("scheduled_iterations", math.inf))
    over = summary["status"] == "diverged" or summary.get("iterations", -1) >= wanted
    return summary if over and summary["status"] in STATUS and summary["status"] != "failed" else None


def _note_failure(directory: Path, error: BaseException) -> None:
    """Correct the summary of a run whose rank 0 was killed, or knows only that it lost another rank."""
    summary = read_summary(directory) or {}
    if summary.get("status") in ("running", "failed"):
        write_summary(directory, {**summary, "status": "failed", "reason": str(error).partition("\n")[0]})


def explain(call: Call) -> Outcome:
    """Print what train would do."""
    shape, rates = call.values.pop("format"), call.values.pop("rates")
    one_of("format", shape, ("text", "json"))
    one_of("rates", rates, ("table", "full"))
    if rates == "full" and shape == "text":
        raise UserError("rates=full lists every iteration, which is for programs: add format=json.")
    config = Config.from_mapping(call.values)
    from largebatch.explain import as_text, explain
    from largebatch.world import hardware

    facts = explain(config, place(config, hardware()), full=rates == "full")
    print(json.dumps(facts, indent=None if rates == "full" else 2) if shape == "json" else as_text(facts))
    return Outcome(0)


def bench(call: Call) -> Outcome:
    """Print how fast this machine is at a run's parts, beside plain PyTorch."""
    shape, asked = call.values.pop("format"), call.values.pop("bench")
    one_of("format", shape, ("text", "json"))
    asked = build(BenchConfig, asked, "bench.")
    config = Config.from_mapping(call.values)
    from largebatch.bench.report import as_text, bench

    facts = bench(config, asked)
    print(json.dumps(facts, indent=2) if shape == "json" else as_text(facts))
    return Outcome(0)


def certify(call: Call) -> Outcome:
    """Hold the trainer against the paper's definition, wherever it can run."""
    shape, asked = call.values.pop("format"), call.values.pop("certify")
    one_of("format", shape, ("text", "json"))
    asked = build(CertifyConfig, asked, "certify.")
    config = Config.from_mapping(call.values)
    if "RANK" in os.environ:
        raise UserError("certify starts its own processes, of every number that divides k: run it without torchrun.")
    from largebatch import certify
    from largebatch.world import hardware

    machine = hardware()
    placement = place(config, machine)
    plan, places = certify.prepare(config, placement, asked, machine)
    parent = Path("runs") / f"certify-{safe_name(config.dataset.name)}-{safe_name(config.model.name)}"
    directory = Path(config.run_dir or default_directory(plan.config, placement.precision, parent))
    certificate = certify.certify(plan, places, directory, shown=sys.stderr.isatty())
    facts = certificate.to_mapping()
    print(json.dumps(finite(facts), indent=2) if shape == "json" else certify.as_text(certificate))
    _say(f"certificate in {directory / 'certificate.json'}")
    return Outcome(0 if certificate.holds else FAULT, str(directory))


COMMANDS = {
    "train": Command("train a network from k workers of n samples each, and record the run", train),
    "certify": Command("prove that k workers are k workers, on any number of processes", certify),
    "explain": Command("say what train would do: rates, iterations, parameters, placement", explain),
    "bench": Command("measure the step, the loader or the exchange here, beside plain PyTorch", bench),
}


def main() -> NoReturn:
    """Run the command line, and exit with its status."""
    try:
        status = run(sys.argv[1:])
    except UserError as error:
        _say(f"largebatch: {error}")
        status = MISTAKE
    except Fault as error:
        _say(f"largebatch: {error}")
        status = FAULT
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as head does
        sys.stdout = None
        status = FAULT
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
    return compose(name, _named_part(rest) if name == "bench" else rest)


def _named_part(arguments: list[str]) -> list[str]:
    """Turn a word after ``bench`` into its value: ``bench step`` is bench.what=step."""
    if not arguments or "=" in arguments[0] or arguments[0].startswith(("-", "+", "~")):
        return arguments
    word, *rest = arguments
    if word not in WHAT:
        raise UserError(f"bench {word} is not known: it measures {', '.join(WHAT)}.{nearest(word, WHAT)}")
    # The customary 100 MB of gradients, unless a network was named.
    model = ["model=resnet50"] if word == "exchange" and not any(a.startswith("model=") for a in rest) else []
    return [f"bench.what={word}", *model, *rest]


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


def compose(name: str, arguments: list[str]) -> int:
    """Compose the configuration of a command with Hydra, and run it once, or once for every arm of a sweep."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back to us, to be put into a sentence
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    outcomes: list[tuple[str, Outcome]] = []
    faults: list[Exception] = []

    def plain(composed: DictConfig) -> Values:
        try:
            values = typing.cast(Values, OmegaConf.to_container(composed, resolve=True))
        except OmegaConfBaseException as error:
            raise UserError(_in_a_sentence(error)) from None
        values.pop("experiment", None)
        return values

    @hydra.main(version_base="1.3", config_path=str(configuration_directory()), config_name=name)
    def application(composed: DictConfig) -> None:
        sys.argv = ["largebatch", name, *arguments]  # Hydra has read its part: the record wants the whole
        hydra_config = HydraConfig.get()
        if hydra_config.mode != RunMode.MULTIRUN:
            try:
                outcomes.append(("", COMMANDS[name].run(Call(plain(composed), None))))
            except Exception as error:  # raised again below: here Hydra would say it in words of its own first
                faults.append(error)
            return
        arm = " ".join(hydra_config.overrides.task)
        try:
            outcome = COMMANDS[name].run(Call(plain(composed), Path(hydra_config.sweep.dir)))
        except UserError as error:
            _say(f"largebatch: {error}")
            outcome = Outcome(MISTAKE, summary={"status": "failed"})
        except Fault as error:
            _say(f"largebatch: {error}")
            outcome = Outcome(FAULT, summary={"status": "failed"})
        except Exception:  # an arm's fault is shown, and the sweep goes on
            traceback.print_exc()
            outcome = Outcome(FAULT, summary={"status": "failed"})
        outcomes.append((arm, outcome))
        if outcome.status in (INTERRUPTED, ENDED):
            raise KeyboardInterrupt

    if "RANK" in os.environ and {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
        raise UserError("a sweep (-m) cannot be run inside a rank: start it once, without torchrun.")
    sys.argv = ["largebatch", *arguments]
    try:
        application()
        for fault in faults:
            raise fault
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_in_a_sentence(error)) from None
    except ValueError as error:
        if not str(error).startswith("Config group override must be"):
            raise
        raise UserError("A group such as model=… takes one of its names, not a number or a list: see --help.") from None
    except KeyboardInterrupt:
        if not outcomes:
            raise
    if not outcomes:  # --help, --cfg
        return 0
    if not outcomes[0][0]:
        return outcomes[0][1].status
    if any(outcome.summary for _, outcome in outcomes):
        _say("\n" + describe((arm, outcome.summary) for arm, outcome in outcomes))
    statuses = {outcome.status for _, outcome in outcomes}
    if statuses & {INTERRUPTED, ENDED}:
        return max(statuses & {INTERRUPTED, ENDED})
    return 0 if statuses <= {0, DIVERGED} else FAULT


def _in_a_sentence(error: Exception) -> str:
    """Put what Hydra found wrong into one sentence, with the nearest key."""
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"'{found[1]}' is not a key.{nearest(found[1], _keys())} `--help` lists them all."
    if found := re.search(r"Could not find '(.+)/([^'/]+)'\s+Available options in '.+':((?:\n\t\S+)+)", text):
        group, given, options = found[1], found[2], found[3].split()
        return f"{group}={given} is not known: it takes {', '.join(options)}.{nearest(given, options)}"
    if found := re.search(r"Ambiguous value for argument '(.+)'", text):
        return f"{found[1]} is several values: add -m to run one after another, or write a list as [1,2]."
    override = getattr(error, "override", None)
    if override is not None:
        return (
            f"'{override}' cannot be read as key=value. Put a value with = , [ or spaces into quotes: "
            "'run_dir=\"runs/k=8\"'."
        )
    return " ".join(f"{text} {error.__cause__ or ''}".split())


def _keys() -> list[str]:
    def walk(cls: type, prefix: str) -> list[str]:
        keys = []
        for name, kind in typing.get_type_hints(cls).items():
            keys.append(prefix + name)
            keys += walk(kind, f"{prefix}{name}.") if is_dataclass(kind) and isinstance(kind, type) else []
        return keys

    return [*walk(Config, ""), *walk(BenchConfig, "bench."), *walk(CertifyConfig, "certify."), "experiment", "format"]


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
        return compose("train", ["-sc", *words])
    program, _, rest = os.environ.get("COMP_LINE", "").partition(" ")
    name, space, line = rest.lstrip().partition(" ")
    if not space:
        print(" ".join(command for command in COMMANDS if command.startswith(name)))
    elif name in COMMANDS:
        os.environ["COMP_LINE"] = f"{program} {line}"
        with contextlib.suppress(UserError):  # the line is not finished: a mistake in it is not to be shown yet
            compose(name, ["-sc", *words])
    return 0


def _say(text: str) -> None:
    """Print a line for people, once for a group of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
