"""Write the page of the study, its tables and figures, from run records.

    largebatch compact runs=runs/study out=results/study/records
    python scripts/study/write.py results/study/records results/study

Written are README.md, table.md, report.html and the figures, and what was found into the experiments' files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jinja2
from evidence import Evidence, theirs
from plan import BEYOND, FULL, LARGE, MARGIN, SIZES, named

from largebatch.records.runs import Run, find, load
from largebatch.reports.figures import curves, scaling
from largebatch.reports.figures.style import styled
from largebatch.reports.output import encode, write
from largebatch.reports.page import page as html
from largebatch.reports.paper import published
from largebatch.reports.tables import NONE, table

HERE = Path(__file__).parent
TRIALS = HERE.parents[1] / "results" / "study" / "trials"
WARMUPS = tuple(named(kn) + end for kn in (LARGE, BEYOND) for end in ("_none", "_constant", ""))
EXPERIMENTS = HERE.parents[1] / "conf" / "experiment"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure1(evidence: Evidence) -> str:
    """Return the table of every kn, against the baseline, and against the size that the paper starts from."""
    heads = ("kn", "k", "rate", "iterations", "error %", "against 64", "verdict", "against 256", "verdict", "published")
    rows = []
    for kn in SIZES:
        name, group = named(kn), evidence.groups[named(kn)]
        iterations = f"{group.runs[0].summary['scheduled_iterations']:,}"
        cells = [str(kn), str(group.k), f"{group.reference_rate:g}", iterations, evidence.error(name)]
        for other in (named(64), named(256)):
            cells += (NONE, NONE) if name == other else evidence.against(name, other)
        rows.append([*cells, theirs("figure1", kn)])
    return markdown(heads, rows)


def versus(evidence: Evidence, rows: Sequence[Sequence[str]], head: str = "") -> str:
    """Return a table of experiments, each against another one.

    Args:
        evidence: The records.
        rows: What it is, the experiment's name, that of the one it is compared with, and what was published, if any.
        head: Of the last column, where something was.
    """
    heads = ("", "error %", "difference", "verdict", *([head] if head else []))
    lines = []
    for what, name, other, *beside in rows:
        compared = (NONE, NONE) if name == other else evidence.against(name, other)
        lines.append((what, evidence.error(name), *compared, *beside))
    return markdown(heads, lines)


def table1(evidence: Evidence) -> str:
    """Return the table of warmups, each against the gradual one of its kn."""
    rows = [("kn = 256", named(256), named(256), theirs("table1", 256, "baseline"))]
    for kn in (LARGE, BEYOND):
        for what, end in (("no warmup", "_none"), ("constant warmup", "_constant"), ("gradual warmup", "")):
            beside = theirs("table1", 8192, what) if kn == LARGE else NONE
            rows.append((f"kn = {kn}, {what}", named(kn) + end, named(kn), beside))
    return versus(evidence, rows, "published, kn = 256 and 8192")


def table2a(evidence: Evidence) -> str:
    """Return the table of rates, each against the reference rate of its kn."""
    small, large, beyond = named(256), named(LARGE), named(BEYOND)
    return versus(
        evidence,
        [
            ("kn = 256, η = 0.2", f"{small}_half", small, theirs("table2a", 256, "η = 0.05")),
            ("kn = 256, η = 0.4", small, small, theirs("table2a", 256, "η = 0.1")),
            ("kn = 256, η = 0.8", f"{small}_double", small, theirs("table2a", 256, "η = 0.2")),
            (f"kn = {LARGE}, half: 0.4", f"{large}_half", large, theirs("table2a", 8192, "η = 0.05 · 32")),
            (f"kn = {LARGE}, linear: 0.8", large, large, theirs("table2a", 8192, "η = 0.1 · 32")),
            (f"kn = {LARGE}, double: 1.6", f"{large}_double", large, theirs("table2a", 8192, "η = 0.2 · 32")),
            (f"kn = {BEYOND}, linear: 1.6", beyond, beyond, NONE),
            (f"kn = {BEYOND}, square root: 0.8", f"{beyond}_sqrt", beyond, theirs("table2a", 8192, "η = 0.1 · √32")),
            (f"kn = {BEYOND}, not scaled: 0.4", f"{beyond}_unscaled", beyond, theirs("table2a", 8192, "η = 0.1")),
        ],
        "published, kn = 256 and 8192",
    )


def table2b(evidence: Evidence) -> str:
    """Return the table of the paper's starting weights, γ = 0 against γ = 1, with those of PyTorch beside them."""
    rows = []
    for kn, their_kn in ((256, 256), (LARGE, 8192)):
        name = named(kn)
        one = f"{name}_gamma1"
        rows += [
            (f"kn = {kn}, He's and γ = 1", one, one, theirs("table2b", their_kn, "γ = 1")),
            (f"kn = {kn}, He's and γ = 0", f"{name}_gamma0", one, theirs("table2b", their_kn, "γ = 0")),
            (f"kn = {kn}, PyTorch's", name, one, NONE),
        ]
    return versus(evidence, rows, "published, kn = 256 and 8192")


def unwarmed(evidence: Evidence) -> str:
    """Return the table of what warmup does from either start."""
    name = named(LARGE)
    rows = [(f"PyTorch's, {what}", name + end, name) for what, end in (("no warmup", "_none"), ("gradual", ""))]
    name += "_gamma0"
    rows += [(f"the paper's, {what}", name + end, name) for what, end in (("no warmup", "_none"), ("gradual", ""))]
    return versus(evidence, rows)


def workers(evidence: Evidence) -> str:
    """Return the table of per-worker n, each against n = 32 and as many samples in all."""
    name = named(LARGE)
    return versus(
        evidence,
        [
            (f"n = 8, k = {LARGE // 8}", f"{name}_n8", name),
            (f"n = 32, k = {LARGE // 32}", name, name),
            (f"n = 128, k = {LARGE // 128}", f"{name}_n128", name),
        ],
    )


def lars(evidence: Evidence) -> str:
    """Return the table of LARS beside SGD."""
    return versus(evidence, [("SGD", "study_4k", "study_4k"), ("LARS", "study_4k_lars", "study_4k")])


def trials(directory: Path) -> str:
    """Return the table of the trials, in the order in which they began."""
    heads = ("images", "start", "epochs", "kn", "rate", "warmup", "error %")
    runs = sorted(map(load, find([str(directory)])), key=lambda run: str(run.provenance["started"]))
    return markdown(heads, [_trial(run) for run in runs])


def _trial(run: Run) -> tuple[str, ...]:
    values = run.experiment
    model, kn, rate = values["model"], values["k"] * values["n"], values["lr"]
    start = "PyTorch's" if model["init"] == "own" else f"He's, γ = {0 if model['zero_gamma'] else 1}"
    name = "" if model["name"] == "resnet8" else f"{model['name']}, "
    optimizer = "" if values["optimizer"]["name"] == "sgd" else f" ({values['optimizer']['name'].upper()})"
    scaled = rate["base"] * kn / rate["base_minibatch"]
    warmup = values["warmup"]["name"] if kn > rate["base_minibatch"] else "none"
    error = NONE if run.final_error is None else f"{run.final_error:.2f}"
    if run.status == "diverged":
        error = "diverged"
    images = f"{values['dataset']['train_images']:,}"
    return images, name + start, str(values["epochs"]), str(kn), f"{scaled:g}{optimizer}", warmup, error


def spent(evidence: Evidence) -> dict[str, str]:
    """Return what the runs took, in words: their number, images and hours of one thread."""
    runs = [run for group in evidence.groups.values() for run in group.runs]
    images = sum(run.summary["iterations"] * run.experiment["k"] * run.experiment["n"] for run in runs)
    hours = sum(float(run.seconds or 0) for run in runs) / 3600
    return {"runs": str(len(runs)), "images": f"{images / 1e6:.1f} million", "hours": f"{hours:.1f}"}


def render(evidence: Evidence) -> str:
    """Return the page's text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("page.md").render(
        error=evidence.error,
        at=evidence.at,
        against=lambda *names: evidence.against(*names)[0],
        verdict=lambda *names: evidence.against(*names)[1],
        figure1=figure1(evidence),
        table1=table1(evidence),
        table2a=table2a(evidence),
        table2b=table2b(evidence),
        workers=workers(evidence),
        lars=lars(evidence),
        trials=trials(TRIALS),
        margin=f"{MARGIN:g}",
        size=FULL,
        spent=spent(evidence),
        trial_count=len(find([str(TRIALS)])),
        unwarmed=unwarmed(evidence),
        warmup_iterations=evidence.warmup_iterations,
        iterations=lambda name: f"{evidence.groups[name].runs[0].summary['scheduled_iterations']:,}",
    )


def draw(evidence: Evidence, out: Path) -> None:
    """Write the figures."""
    figures = {
        "scaling": scaling.draw(evidence.selection(map(named, SIZES)), published("figure1"), MARGIN),
        "curves": curves.draw(evidence.selection(map(named, SIZES)), curves.CurveOptions(recomputed=True)),
        "warmup": curves.draw(
            evidence.selection(WARMUPS),
            curves.CurveOptions(),
        ),
    }
    for name, figure in figures.items():
        for ending in (".svg", ".png"):
            write(out / f"{name}{ending}", encode(figure, ending))


def page(records: Path, out: Path) -> None:
    """Write all that follows from the records below a directory."""
    evidence = Evidence.of(records)
    everything = evidence.selection(evidence.groups)
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(render(evidence), encoding="utf-8")
    (out / "table.md").write_text(table(everything, MARGIN, "markdown", None) + "\n", encoding="utf-8")
    with styled():
        # Of all experiments the legends alone would be taller than a chart.
        write(
            out / "report.html",
            html(evidence.selection(dict.fromkeys([*map(named, SIZES), *WARMUPS])), MARGIN).encode(),
        )
        draw(evidence, out)
    print(f"{out / 'README.md'}, table.md, report.html and figures, from {len(everything.runs)} runs")


def note_found(evidence: Evidence) -> None:
    """Write the error of every experiment into the head of its file."""
    for name in evidence.groups:
        path = EXPERIMENTS / f"{name}.yaml"
        head, core, rest = path.read_text(encoding="utf-8").partition(" on one core.")
        _, _, body = rest.partition("\n")
        path.write_text(f"{head}{core} Found: {evidence.error(name)} %.\n{body}", encoding="utf-8")


def main() -> None:
    """Write the page of one directory of records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="directory of run records")
    parser.add_argument("out", type=Path, help="directory to write")
    asked = parser.parse_args()
    page(asked.records, asked.out)
    note_found(Evidence.of(asked.records))


if __name__ == "__main__":
    main()
