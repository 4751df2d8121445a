"""The paper's two figures of run time: time of an iteration against kn, and images/s against GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from largebatch.reports.figures import style
from largebatch.reports.figures.scaling import PUBLISHED
from largebatch.reports.paper import RunTime

PER_GPU = 32  # samples


@dataclass(frozen=True)
class Told:
    """Predicted time of an iteration of kn samples on ``gpus`` GPUs, in s: in total, and without stragglers."""

    kn: int
    gpus: int
    seconds: float
    without_stragglers: float


def draw(published: Sequence[RunTime], told: Sequence[Told], name: str) -> Figure:
    """Return the figure.

    Args:
        published: What the text has, by rising kn.
        told: By a model, by rising kn.
        name: Of the model's machine.
    """
    figure = style.blank(10.5, 4.8)
    left, right = figure.subplots(1, 2)
    whole, part = style.look(0), style.look(1)
    theirs = "Goyal et al. (2017), from their text"
    sizes, gpus = [one.kn for one in told], [one.gpus for one in told]

    left.plot(sizes, [1000 * one.seconds for one in told], color=whole.colour, ls=whole.dashes, lw=whole.width)
    left.plot(sizes, [1000 * one.without_stragglers for one in told], color=part.colour, ls=part.dashes, lw=part.width)
    left.plot([one.kn for one in published], [1000 * one.seconds for one in published], "D", color=PUBLISHED, ms=7)
    for number, one in enumerate(published):  # in turns above and below the line
        away = {"xytext": (0, -20 if number % 2 else 12), "textcoords": "offset points", "fontsize": 9}
        left.annotate(one.what, (one.kn, 1000 * one.seconds), ha="right" if number else "left", **away)
    left.set(xlabel="minibatch size kn", title="time an iteration (ms)")
    left.set_ylim(0, 1250 * max(*(one.seconds for one in published), *(one.seconds for one in told)))
    style.doubling_axis(left, sizes)

    speeds = [one.kn / one.seconds for one in told]
    right.plot(gpus, speeds, color=whole.colour, ls=whole.dashes, lw=whole.width, label=f"predicted, on {name}")
    without = [one.kn / one.without_stragglers for one in told]
    right.plot(gpus, without, color=part.colour, ls=part.dashes, lw=part.width, label="predicted, without stragglers")
    right.plot(
        [one.kn // PER_GPU for one in published],
        [one.kn / one.seconds for one in published],
        "D",
        color=PUBLISHED,
        ms=7,
        label=theirs,
    )
    ideal = [speeds[0] * number / gpus[0] for number in gpus]
    right.plot(gpus, ideal, color="#444444", ls=":", lw=1.4, label=f"ideal: as many times {gpus[0]} GPUs")
    right.set(xlabel="GPUs", title="images a second", yscale="log")
    style.doubling_axis(right, gpus)
    style.plain_numbers(right)
    for axes in (left, right):
        style.grid(axes)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure
