"""Predict memory and traffic of each offloading mode, before anything is evaluated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from largebatch.inference.session import Session
from largebatch.inference.summary import size
from largebatch.offloading.plan import Plan, choose, make_plans, measure_bus


def plan(session: Session) -> dict[str, Any]:
    """Measure the way to the device, and return what every mode would take.

    One image goes through each network on the CPU: whose modules read each other's weights shows in a pass.

    Returns:
        ``plans``, a mapping a mode: ``mode``, ``peak_bytes`` (of weights on the device), ``moved_bytes``,
        ``copy_seconds`` (on the bus), ``seconds`` (with computing where that is known, beside which copies go on) and
        ``fits`` (the budget); ``choice``, the one to take, or null where none fits; ``bytes_per_second`` and
        ``seconds_per_copy`` of the bus; ``compute_seconds``, null where no earlier evaluation tells; ``budget``,
        ``networks``, ``batches``.
    """
    asked = session.asked
    bus = measure_bus(session.world.device)
    compute = _computing(session)
    loads = 1 + math.ceil((len(session.cuts) - 1) / asked.batches_per_load)  # the first batch goes alone
    how = (asked.budget_bytes, asked.groups, asked.prefetch)
    plans = make_plans(session.models, loads, bus, compute or 0.0, *how)
    # Under submodule each network has the whole budget for itself, in its turn.
    share = (compute or 0.0) / len(session.models)
    start = session.cuts[0].start
    image = next(session.source.validation([range(start, start + 1)])).images.cpu()
    turns = [
        make_plans({name: model}, loads, bus, share, *how, {name: image})[1] for name, model in session.models.items()
    ]
    plans[1] = Plan(
        plans[1].mode,
        peak_bytes=max(one.peak_bytes for one in turns),
        moved_bytes=sum(one.moved_bytes for one in turns),
        copy_seconds=sum(one.copy_seconds for one in turns),
        seconds=sum(one.seconds for one in turns),
        fits=all(one.fits for one in turns),
    )
    chosen = choose(plans)
    return {
        "plans": [asdict(one) for one in plans],
        "choice": chosen.mode if chosen else None,
        **asdict(bus),
        "compute_seconds": compute,
        "budget": asked.budget_bytes,
        "networks": len(session.models),
        "batches": len(session.cuts),
    }


def _computing(session: Session) -> float | None:
    """Return what evaluating took before on such a device, with all weights there; None where that is not recorded."""
    here = {**session.where(), "offload": "none", "ensemble": None}
    total = 0.0
    for subject in session.subjects:
        times = [line["seconds"] for line in subject.evaluations() if here.items() <= line.items()]
        if not times:
            return None
        total += min(times)
    return total


def plan_as_text(facts: Mapping[str, Any]) -> str:
    """Return a plan as a table for people, and which mode to choose."""
    budget, known = facts["budget"], facts["compute_seconds"] is not None
    rows = [["mode", "weights there", "moved", "copies"] + ["with computing"] * known + ["budget"] * bool(budget)]
    for one in facts["plans"]:
        row = [one["mode"], size(one["peak_bytes"]), size(one["moved_bytes"]), _time(one["copy_seconds"])]
        rows.append(row + [_time(one["seconds"])] * known + ["fits" if one["fits"] else "too small"] * bool(budget))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    bus = f"{size(facts['bytes_per_second'])}/s and {facts['seconds_per_copy'] * 1e6:.3g} µs a copy"
    what = f"{facts['networks']} network{'s' * (facts['networks'] > 1)}, {facts['batches']} batches"
    notes = [f"For {what}; the way to the device has {bus}. Activations come on top."]
    if not known:
        notes.append("Copies run during computing, whose time is known after an evaluation with offload=none.")
    least = min(one["peak_bytes"] for one in facts["plans"])
    if facts["choice"] is None:
        notes.append(f"Nothing fits budget={budget}: the least is {least}, offload=submodule.")
    else:
        within = "" if budget is None else f" within {size(budget)}"
        notes.append(f"Choose offload={facts['choice']}{within}.")
    return "\n".join([*table, "", *notes])


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"
