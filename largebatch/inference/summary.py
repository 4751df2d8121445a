"""Report an evaluation: as a mapping with stable keys, as text, and as a line of each run's record.

A line of ``evaluations.jsonl`` is the mapping that :func:`evaluate` returns. Errors are in %, sizes in bytes.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from largebatch.inference.measure import Measured, measure
from largebatch.inference.session import Session
from largebatch.inference.subject import Subject
from largebatch.offloading import Statistics
from largebatch.records.provenance import SCHEMA, git_state, versions
from largebatch.records.write import finite
from largebatch.training.validation import Evaluation

TURNS = 2  # of each side of compare=true
FOLDED = "BatchNorm is folded into the convolutions (fold_bn=true): figures are the record's up to rounding."

IN_INTEGERS = "In integers (quantized=true), computed by engine={}."


def evaluate(session: Session) -> dict[str, Any]:
    """Evaluate, and return:

    ``members``
        A mapping a network: ``name``, ``weights`` (file), ``iteration``, ``error``, ``error_top5``, ``loss``,
        ``unreadable``, ``recorded`` (what its run recorded at these weights, or null).
    ``ensemble``
        ``combine``, ``error``, ``error_top5``, ``loss``; null for a network alone.
    ``offload``, ``groups``, ``prefetch``, ``batches_per_load``, ``budget``
        How the weights shared the device.
    ``device``, ``device_name``, ``precision``, ``fold_bn``, ``images``, ``batch``
        Where, how, and over how many images.
    ``seconds``, ``images_per_second``
        Images of every network counted.
    ``weight_bytes``, ``peak_weight_bytes``
        All weights, with what aligns them; the most of them on the device at a time.
    ``peak_device_bytes``, ``host_peak_bytes``
        The most memory allocated on the device, activations included (null on the CPU, where nobody counts); the most
        that the process ever had in host memory.
    ``uploads``, ``bytes_to_device``, ``bytes_from_device``
        Weights that were moved.
    ``compared``
        With ``compare``: ``seconds`` and ``seconds_none`` of the turns, ``ratio`` of their medians,
        ``peak_device_bytes_none``, ``equal`` (whether every figure was the same, to the last bit).
    ``skipped``
        Images that dataset.on_error=skip has left out, each with the reason.
    ``schema``, ``kind``, ``evaluated``, ``versions``, ``git``
        Where it comes from.
    ``notes``
        Sentences that a reader of the figures must know.
    """
    asked = session.asked
    if asked.compare:
        measured, compared = _in_turns(session)
    else:
        measured, compared = measure(session, asked.offload), None
    return {
        "schema": SCHEMA,
        "kind": "evaluation",
        "evaluated": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "members": [_member(subject, measured) for subject in session.subjects],
        "ensemble": {"combine": asked.combine, **_figures(measured.ensemble)} if measured.ensemble else None,
        **{key: getattr(asked, key) for key in ("offload", "groups", "prefetch", "batches_per_load")},
        "budget": asked.budget_bytes,
        **session.where(),
        "seconds": measured.seconds,
        "images_per_second": measured.images_per_second,
        **_moved(session, measured.traffic),
        "peak_device_bytes": measured.peak_device_bytes,
        "host_peak_bytes": _host_peak(),
        "compared": compared,
        "skipped": sorted({*session.skipped}),
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
        "notes": [note for subject in session.subjects for note in subject.notes(session.placement.precision)]
        + [FOLDED] * asked.fold_bn
        + [IN_INTEGERS.format(session.where().get("quantized"))] * asked.quantized,
    }


def _in_turns(session: Session) -> tuple[Measured, dict[str, Any]]:
    """Evaluate with and without offloading in turns: a machine that slows down does so for both."""
    mode = session.asked.offload
    for warming in ("none", mode):
        measure(session, warming, cuts=1)
    turns: dict[str, list[Measured]] = {"none": [], mode: []}
    order = ["none", mode]
    for _ in range(TURNS):
        for side in order:
            turns[side].append(measure(session, side))
        order.reverse()
    seconds = {side: [one.seconds for one in measured] for side, measured in turns.items()}
    return turns[mode][0], {
        "seconds": seconds[mode],
        "seconds_none": seconds["none"],
        "ratio": statistics.median(seconds[mode]) / statistics.median(seconds["none"]),
        "peak_device_bytes_none": turns["none"][0].peak_device_bytes,
        "equal": _exactly(turns["none"][0]) == _exactly(turns[mode][0]),
    }


def _exactly(measured: Measured) -> str:
    return repr((measured.members, measured.ensemble))  # every bit, and a loss that is not a number is like itself


def _member(subject: Subject, measured: Measured) -> dict[str, Any]:
    return {
        "name": subject.name,
        "weights": str(subject.weights),
        "iteration": subject.iteration,
        **_figures(measured.members[subject.name]),
        "recorded": subject.recorded,
    }


def _figures(found: Evaluation) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("error", "error_top5", "loss", "unreadable")}


def _moved(session: Session, traffic: Sequence[Statistics]) -> dict[str, int]:
    weights, there = sum(one.weight_bytes for one in traffic), max((one.peak_bytes for one in traffic), default=0)
    moved = sum(one.bytes_to_device for one in traffic)
    if not traffic:  # offload=none
        weights = there = sum(tensor.nbytes for one in session.models.values() for tensor in one.state_dict().values())
        moved = weights if session.placement.device != "cpu" else 0
    return {
        "weight_bytes": weights,
        "peak_weight_bytes": there,
        "uploads": sum(one.uploads for one in traffic),
        "bytes_to_device": moved,
        "bytes_from_device": sum(one.bytes_from_device for one in traffic),
    }


def _host_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep(session: Session, facts: Mapping[str, Any]) -> list[str]:
    """Append an evaluation to the record of every run that took part, and return where that was not possible."""
    line = json.dumps(finite(facts), ensure_ascii=False) + "\n"
    problems = []
    for subject in session.subjects:
        if subject.record is None:
            continue
        try:
            with subject.record.open("a", encoding="utf-8") as file:
                file.write(line)  # in one piece, so that two evaluations at once leave two lines
        except OSError as error:  # such as of a colleague's run, which may be read alone
            problems.append(f"{subject.record} could not be written, so this evaluation is not recorded: {error}")
    return problems


def as_text(facts: Mapping[str, Any]) -> str:
    """Return the facts as a page for people."""
    rows = _rows_alone(facts["members"][0]) if facts["ensemble"] is None else _rows_together(facts)
    budget = "" if facts["budget"] is None else f", budget {size(facts['budget'])}"
    batch = "" if facts["batch"] is None else f", {facts['batch']} a pass"
    rows += [
        ("images", f"{facts['images']:,}{batch}, on {facts['device_name']} in {facts['precision']}"),
        ("speed", f"{facts['images_per_second']:,.0f} images/s ({facts['seconds']:.3g} s)"),
        ("offload", f"{facts['offload']}{budget}"),
        ("weights", _weights(facts)),
    ]
    if facts["peak_device_bytes"] is not None:
        rows.append(("device memory", f"at most {size(facts['peak_device_bytes'])}, activations included"))
    rows.append(("host memory", f"at most {size(facts['host_peak_bytes'])}, the program included"))
    if facts["compared"]:
        rows.append(("against none", _against_none(facts["compared"])))
    rows += [("note", note) for note in facts["notes"]]
    return "\n".join(f"{name:<14} {value}" for name, value in rows)


def _rows_alone(member: Mapping[str, Any]) -> list[tuple[str, str]]:
    after = "" if member["iteration"] is None else f" (after iteration {member['iteration']:,})"
    return [
        ("network", member["name"]),
        ("of", f"{member['weights']}{after}"),
        ("error", f"{member['error']:.2f} %{_beside_record(member)}"),
        *_rest(member),
    ]


def _rows_together(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    members = facts["members"]
    width = max(len(member["name"]) for member in members)
    rows = [("members", str(len(members)))]
    rows += [("", f"{one['name']:<{width}}  {one['error']:.2f} %{_beside_record(one)}") for one in members]
    mean = sum(member["error"] for member in members) / len(members)
    what = f"mean of {facts['ensemble']['combine']}; a member's is {mean:.2f} % on average"
    rows.append(("error", f"{facts['ensemble']['error']:.2f} % ({what})"))
    return [*rows, *_rest(facts["ensemble"])]


def _rest(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("top-5 error", f"{figures['error_top5']:.2f} %"), ("loss", f"{figures['loss']:.4f}")]
    if figures["unreadable"]:
        rows.append(("unreadable", f"{figures['unreadable']} images, counted as wrong"))
    return rows


def _beside_record(member: Mapping[str, Any]) -> str:
    if member["iteration"] is None:
        return ""
    if member["recorded"] is None:
        return ", and the record has no validation at these weights"
    before = member["recorded"]["error"]
    return ", as recorded" if member["error"] == before else f", where the record has {before:.2f} %"


def _weights(facts: Mapping[str, Any]) -> str:
    share = f"at most {size(facts['peak_weight_bytes'])} of {size(facts['weight_bytes'])} on the device"
    if facts["offload"] == "none":
        return share
    moved = f"{size(facts['bytes_to_device'])} moved there in {facts['uploads']:,} uploads"
    return f"{share}, {moved}, {size(facts['bytes_from_device'])} back"


def _against_none(compared: Mapping[str, Any]) -> str:
    sides = (min(compared[name]) for name in ("seconds", "seconds_none"))
    with_it, without = (f"{seconds:.3g} s" for seconds in sides)
    peak = compared["peak_device_bytes_none"]
    memory = "" if peak is None else f"; that took {size(peak)} on the device"
    figures = "the same figures" if compared["equal"] else "other figures"
    return (
        f"{figures}, {compared['ratio']:.2f} × the time (at best {with_it}, and {without} without offloading{memory})"
    )


def size(count: float) -> str:
    """Return a number of bytes as people read it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
