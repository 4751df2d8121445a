"""``largebatch plot``: figures of runs, for a paper and for a slide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from largebatch.base.errors import UserError, nearest
from largebatch.cli.arguments import BOOLEAN, Given, Vocabulary, Word, verb_first
from largebatch.cli.command import PlainCommand

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from largebatch.reports.selection import Selection


@dataclass(frozen=True)
class Kind:
    """A figure: what it shows, the words it takes besides those of all figures, examples, and how it is drawn.

    ``draw`` is given no selection where ``drawn_alone`` says that these words need no run.
    """

    summary: str
    words: tuple[Word, ...]
    examples: tuple[tuple[str, str], ...]
    draw: Callable[[Selection | None, Given], Figure]
    drawn_alone: Callable[[Given], bool] = lambda given: False


def _curves(selection: Selection | None, given: Given) -> Figure:
    from largebatch.reports.figures.curves import CurveOptions, draw

    assert selection is not None
    metric, show, x = (str(given.text(key)) for key in ("metric", "show", "x"))
    return draw(selection, CurveOptions(metric, show, x, given.flag("recomputed"), given.whole("smooth", least=1)))


def _scaling(selection: Selection | None, given: Given) -> Figure:
    from largebatch.reports.figures.scaling import draw
    from largebatch.reports.paper import published

    return draw(selection, published("figure1") if given.flag("paper") else None, given.number("margin", above=0))


def _rates(selection: Selection | None, given: Given) -> Figure:
    from largebatch.reports.figures.rates import draw

    assert selection is not None
    return draw(selection, str(given.text("x")))


def _throughput(selection: Selection | None, given: Given) -> Figure:
    from largebatch.cost_model.model import Question, predict
    from largebatch.cost_model.profile import check_is_of, load
    from largebatch.reports.figures import run_time, throughput
    from largebatch.reports.paper import run_times

    name = given.text("profile")
    if selection is None:
        profile = load(name or "paper")
        told = []
        for gpus in (*(2**power for power in range(3, 9)), 352):
            whole = predict(profile, Question(), gpus, gpus)
            told.append(run_time.Told(gpus * whole.n, gpus, whole.iteration, whole.iteration - whole.stragglers))
        return run_time.draw(run_times(), told, profile.device)
    if given.flag("paper"):
        raise UserError("paper=true draws only the paper's machine: leave runs= out.")
    if name is None:
        return throughput.draw(selection, str(given.text("x")))
    profile, nodes = load(name), given.whole("nodes", least=1) if given.text("nodes") else None
    for group in selection.groups:
        check_is_of(profile, name, model=group.settings["model.name"], n=group.settings["n"])
    return throughput.draw(
        selection,
        str(given.text("x")),
        lambda speed: predict(profile, Question(), speed.minibatch // profile.n, speed.processes, nodes).iteration,
    )


def _probe(selection: Selection | None, given: Given) -> Figure:
    from largebatch.reports.figures.probe import draw

    assert selection is not None
    return draw(selection, str(given.text("drift")))


KINDS = {
    "curves": Kind(
        "Draw training and validation error against epochs: a panel for every group of runs, beside the baseline. "
        "Lines are means over the seeds, bands ± 1 std; the legend has the final error, the median of a run's last "
        "five epochs, as mean ± std.",
        (
            Word("metric", "error", "What is drawn.", ("error", "top5", "loss")),
            Word("show", "both", "Which curves are drawn.", ("both", "train", "validation")),
            Word(
                "x", "epochs", "Progress in what; hours are of training.", ("epochs", "iterations", "images", "hours")
            ),
            Word(
                "recomputed",
                "false",
                "Draw also the validation error with recomputed BN statistics, of runs with bn.recompute=true.",
                BOOLEAN,
            ),
            Word("smooth", "1", "Epochs of a trailing mean; 1 draws what was recorded."),
        ),
        (
            ("plot curves runs=runs/digits-resnet8", "every experiment below, in curves.svg"),
            ("plot curves runs=runs/sweep baseline=k=8 x=hours out=hours.pdf", "against wall-clock time"),
        ),
        _curves,
    ),
    "scaling": Kind(
        "Draw the final error against the size of the minibatch, mean ± 2 std, as the paper's Figure 1 does, and mark "
        "the largest k that is equivalent to the baseline, below the first that is worse (`largebatch table --help`).",
        (
            Word("paper", "false", "Draw the published points on ImageNet; they need no runs=.", BOOLEAN),
            Word("margin", "0.5", "Largest difference of errors that counts as equivalent, in points of error."),
        ),
        (
            ("plot scaling runs=runs/sweep", "one line for every way to warm up, in scaling.svg"),
            ("plot scaling paper=true out=figure1.png", "what the paper published"),
        ),
        _scaling,
        drawn_alone=lambda given: given.flag("paper") and "runs" not in given.values,
    ),
    "rates": Kind(
        "Draw the learning rate of every iteration, as the experiments define it.",
        (Word("x", "epochs", "Progress in what.", ("epochs", "iterations", "images")),),
        (("plot rates runs=runs/sweep", "one line for every schedule, in rates.svg"),),
        _rates,
    ),
    "throughput": Kind(
        "Draw images a second and the time of an iteration as they were measured, the median of every run's epochs, "
        "and what ideal scaling would be.",
        (
            Word("x", "k", "Against the logical workers or the processes that computed them.", ("k", "processes")),
            Word(
                "paper",
                "false",
                "Draw what the paper published of its run time, and what a profile predicts; it needs no runs=.",
                BOOLEAN,
            ),
            Word(
                "profile",
                None,
                "Also draw the prediction of `largebatch predict` with this profile. With paper=true by default paper.",
                path=True,
            ),
            Word("nodes", None, "How many nodes that is predicted for. By default as few as hold the processes."),
        ),
        (
            ("plot throughput runs=runs/sweep x=processes", "how well processes scale, in throughput.svg"),
            ("plot throughput runs=runs/sweep x=processes profile=my.json", "and what was predicted"),
            ("plot throughput paper=true", "the paper's 8 to 352 GPUs, and the model of them"),
        ),
        _throughput,
        drawn_alone=lambda given: given.flag("paper") and "runs" not in given.values,
    ),
    "probe": Kind(
        "Draw what `largebatch probe` measured of every group of runs, in its first seed that was probed: drift "
        "against the small steps at several epochs, noise scale and sharpness against the epochs, with the warmup "
        "shaded.",
        (Word("drift", "end_point", "What is drawn of the drift.", ("end_point", "distance", "cosine")),),
        (("plot probe runs=runs/probed baseline=none", "a row of panels a group, in probe.svg"),),
        _probe,
    ),
}


def run(arguments: list[str]) -> int:
    """Write a figure, and return the exit status."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print(_help())
        return 0
    name, *rest = verb_first(arguments)
    if name not in KINDS:
        raise UserError(f"plot draws {', '.join(KINDS)}, not '{name}'.{nearest(name, KINDS)}")
    kind = KINDS[name]
    from largebatch.cli.selecting import BELONGING, SELECTING, selected, status_after_warnings

    said = "The file to write: .svg, .pdf or .png; several as a.svg,b.png."
    out = Word("out", f"{name}.svg", said, many=True, path=True)
    given = Vocabulary(f"plot {name}", kind.summary, (*SELECTING, out, *kind.words), kind.examples, (BELONGING,)).read(
        rest
    )
    if given is None:
        return 0
    from largebatch.reports.figures.style import styled
    from largebatch.reports.output import FIGURES, check_output, encode, write

    paths = [Path(text) for text in given.all("out")]
    for path in paths:
        check_output(path, FIGURES)
    selection = None if kind.drawn_alone(given) else selected(given)
    with styled():
        figure = kind.draw(selection, given)
        for path in paths:
            write(path, encode(figure, path.suffix.lower()))
            print(path)
    return status_after_warnings(selection) if selection else 0


def _help() -> str:
    width = max(map(len, KINDS))
    lines = [f"  {name:<{width}}  {kind.summary.partition(':')[0].partition(', ')[0]}" for name, kind in KINDS.items()]
    return "\n".join(
        [
            "largebatch plot FIGURE [key=value …]",
            "",
            "Draw a figure of recorded runs, in SVG, PDF or PNG.",
            "",
            *lines,
            "",
            "largebatch plot FIGURE --help lists its keys.",
        ]
    )


PLOT = PlainCommand("draw figures of recorded runs: curves, scaling, rates, throughput, probe", run)
