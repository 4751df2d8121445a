"""``largebatch.plot``: figures of recorded runs, as matplotlib Figures that a notebook shows."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from largebatch.api.recorded import Run, Runs, selection_of
from largebatch.base.errors import at_least, one_of
from largebatch.reports.figures.curves import METRICS, CurveOptions
from largebatch.reports.figures.curves import draw as draw_curves
from largebatch.reports.figures.probe import draw as draw_probe
from largebatch.reports.figures.rates import draw as draw_rates
from largebatch.reports.figures.scaling import draw as draw_scaling
from largebatch.reports.figures.series import X_AXES
from largebatch.reports.figures.style import styled
from largebatch.reports.figures.throughput import draw as draw_throughput
from largebatch.reports.paper import published
from largebatch.reports.selection import Selection

__all__ = ["curves", "probe", "rates", "scaling", "throughput"]


def curves(
    runs: Runs,
    *,
    baseline: str | Run | None = None,
    only: str | None = None,
    metric: str = "error",
    show: str = "both",
    x: str = "epochs",
    recomputed: bool = False,
    smooth: int = 1,
    allow_mixed: bool = False,
) -> Figure:
    """Draw training and validation error against epochs: a panel for each group of runs, with the baseline.

    Args:
        runs: Runs, directories or globs.
        baseline: See :func:`largebatch.table`.
        only: See :func:`largebatch.table`.
        metric: error, top5 or loss.
        show: both, train or validation.
        x: epochs, iterations, images or hours.
        recomputed: Draw also the validation error with recomputed BatchNorm statistics.
        smooth: Epochs of a trailing mean; 1 draws what was recorded.
        allow_mixed: Compare also runs of different epochs, data sets or models.

    Raises:
        UserError: no run matches, an option is not known, or the runs cannot be compared.
    """
    one_of("metric", metric, tuple(METRICS))
    one_of("show", show, ("both", "train", "validation"))
    one_of("x", x, tuple(X_AXES))
    at_least("smooth", smooth, 1)
    options = CurveOptions(metric, show, x, recomputed, smooth)
    return _drawn(lambda found: draw_curves(found, options), runs, baseline, only, allow_mixed)


def scaling(
    runs: Runs,
    *,
    baseline: str | Run | None = None,
    only: str | None = None,
    margin: float = 0.5,
    paper: bool = False,
    allow_mixed: bool = False,
) -> Figure:
    """Draw the final error against the size of the minibatch, mean ± 2 std, as the paper's Figure 1 does.

    Args:
        runs: Runs, directories or globs.
        baseline: See :func:`largebatch.table`.
        only: See :func:`largebatch.table`.
        margin: Points of error within which groups count as equivalent.
        paper: Draw also the published points on ImageNet.
        allow_mixed: Compare also runs of different epochs, data sets or models.

    Raises:
        UserError: no run matches, or the runs cannot be compared.
    """
    points = published("figure1") if paper else None
    return _drawn(lambda found: draw_scaling(found, points, margin), runs, baseline, only, allow_mixed)


def rates(
    runs: Runs,
    *,
    baseline: str | Run | None = None,
    only: str | None = None,
    x: str = "epochs",
    allow_mixed: bool = False,
) -> Figure:
    """Draw the learning rate of every iteration, as the experiments define it.

    Args:
        runs: Runs, directories or globs.
        baseline: See :func:`largebatch.table`.
        only: See :func:`largebatch.table`.
        x: epochs, iterations or images.
        allow_mixed: Compare also runs of different epochs, data sets or models.

    Raises:
        UserError: no run matches, or the runs cannot be compared.
    """
    one_of("x", x, ("epochs", "iterations", "images"))
    return _drawn(lambda found: draw_rates(found, x), runs, baseline, only, allow_mixed)


def throughput(
    runs: Runs, *, baseline: str | Run | None = None, only: str | None = None, x: str = "k", allow_mixed: bool = False
) -> Figure:
    """Draw images a second and the time of an iteration as they were measured.

    Args:
        runs: Runs, directories or globs.
        baseline: See :func:`largebatch.table`.
        only: See :func:`largebatch.table`.
        x: k, or processes.
        allow_mixed: Compare also runs of different epochs, data sets or models.

    Raises:
        UserError: no run matches, or the runs cannot be compared.
    """
    one_of("x", x, ("k", "processes"))
    return _drawn(lambda found: draw_throughput(found, x), runs, baseline, only, allow_mixed)


def probe(
    runs: Runs,
    *,
    baseline: str | Run | None = "none",
    only: str | None = None,
    drift: str = "end_point",
    allow_mixed: bool = False,
) -> Figure:
    """Draw what was measured along probed runs: drift against the small steps, noise scale, sharpness.

    Args:
        runs: Runs, directories or globs.
        baseline: See :func:`largebatch.table`.
        only: See :func:`largebatch.table`.
        drift: end_point, distance or cosine.
        allow_mixed: Compare also runs of different epochs, data sets or models.

    Raises:
        UserError: no run matches, or none was probed.
    """
    one_of("drift", drift, ("end_point", "distance", "cosine"))
    return _drawn(lambda found: draw_probe(found, drift), runs, baseline, only, allow_mixed)


def _drawn(
    draw: Callable[[Selection], Figure], runs: Runs, baseline: str | Run | None, only: str | None, allow_mixed: bool
) -> Figure:
    found = selection_of(runs, baseline, only, allow_mixed, stacklevel=4)
    with styled():
        return draw(found)
