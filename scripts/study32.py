"""Run the study of results/study32, which plan.md fixes, run by run. Stopped and started again, it goes on.

    python scripts/study32.py list              # every run that is known so far, in order, and which are done
    python scripts/study32.py run               # run them; jobs=2: two at a time
    python scripts/study32.py collect           # copy what is done to results/study32/runs.jsonl, to be committed

Runs are recorded in runs/study32. What results/study32/runs.jsonl holds is not run again. The base rate and the largest
k that holds are read from the records, as the plan says; what depends on them is known once they are.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance

from largebatch.base.outcome import DIVERGED
from largebatch.base.signals import Ended, ended_by_signals
from largebatch.records.packed import NAME, unpack
from largebatch.records.read import read_summary
from largebatch.records.runs import Run, load

ROOT = Path(__file__).parents[1]
RUNS, RECORDS = Path("runs", "study32"), ROOT / "results" / "study32"
# On any machine: one thread a run, so that as many runs as cores go at once; a machine that is busy is not a hang.
EVERY = (
    *("device=cpu", "precision=fp32", "threads=1", "channels_last=true", "loader.workers=0"),
    *("launcher.timeout=null", "resume=true"),
)

RATES = (0.003125, 0.00625, 0.0125, 0.025, 0.05)  # of 32 samples: 0.025, 0.05, 0.1, 0.2, 0.4 of 256
RATE_SEEDS = (20, 21)
SIZES = tuple(2**power for power in range(10))  # k = 1 to 512
SEEDS, MORE_SEEDS = (10, 11, 12), (13, 14)
MARGIN = 0.5  # points
PROBE = ("probe.every=3", "probe.steps=256")  # changes no bit of the run that it is made on
BOTH_STATISTICS = ("bn.recompute=true",)


@dataclass(frozen=True)
class Planned:
    """One run: its directory's name, and the words that make it."""

    name: str
    words: tuple[str, ...]


def rate_run(rate: float, seed: int) -> Planned:
    """Return a run of the baseline on held-out images."""
    return Planned(f"rate{rate:g}-s{seed}", ("experiment=study32_rate", f"lr.base={rate:g}", f"seed={seed}"))


def arm(name: str, experiment: str, k: int, rate: float, seed: int, *more: str) -> Planned:
    """Return a run on the test images."""
    words = (f"experiment={experiment}", f"k={k}", f"lr.base={rate:g}", f"seed={seed}", *more)
    return Planned(f"{name}-k{k}-s{seed}", words)


def size_run(k: int, rate: float, seed: int) -> Planned:
    """Return a run of Figure 1; the baseline's first one is probed."""
    more = BOTH_STATISTICS if k in (1, 32, 64) else ()
    probed = PROBE if (k, seed) == (1, SEEDS[0]) else ()
    return arm("figure1", "study32", k, rate, seed, *more, *probed)


def choose_rate(errors: Mapping[float, Sequence[float]]) -> float:
    """Return the smallest rate whose mean error is at most the lowest mean plus its standard error.

    Args:
        errors: Held-out errors in % by rate, of as many seeds each; a rate of which a run diverged is left out.
    """
    means = {rate: fmean(found) for rate, found in errors.items()}
    seeds = len(next(iter(errors.values())))
    pooled = fmean(variance(found) for found in errors.values())  # over all rates, for each has few seeds
    return min(rate for rate, mean in means.items() if mean <= min(means.values()) + (pooled / seeds) ** 0.5)


def largest_that_holds(errors: Mapping[int, Sequence[float]]) -> int:
    """Return the largest k up to which every mean error is within the margin of the baseline's.

    Args:
        errors: Test errors in % by k, of the first three seeds; a k of which a run diverged has none.
    """
    held = 1
    for k in SIZES[1:]:
        if not errors.get(k) or abs(fmean(errors[k]) - fmean(errors[1])) > MARGIN:
            break
        held = k
    return held


def stages(found: Mapping[str, Run]) -> Iterator[list[Planned]]:
    """Yield the runs in order. A stage is known when the one before it is over.

    Args:
        found: The runs that are over, by name.
    """
    yield [rate_run(rate, seed) for seed in RATE_SEEDS for rate in RATES]
    measured = {rate: [found[rate_run(rate, seed).name].final_error for seed in RATE_SEEDS] for rate in RATES}
    rate = choose_rate({rate: errors for rate, errors in measured.items() if None not in errors})
    for seed in SEEDS:
        yield [size_run(k, rate, seed) for k in SIZES]
    tested = {k: [found[size_run(k, rate, seed).name].final_error for seed in SEEDS] for k in SIZES}
    held = largest_that_holds({k: errors for k, errors in tested.items() if None not in errors})
    beyond = 2 * held
    yield [size_run(k, rate, seed) for seed in MORE_SEEDS for k in dict.fromkeys((1, held))]
    for k in (held, beyond):  # Table 1
        yield [arm(name, f"study32_{name}", k, rate, seed) for name in ("none", "constant") for seed in SEEDS]
    for name in ("unscaled", "sqrt"):  # Table 2a
        yield [arm(name, f"study32_{name}", held, rate, seed) for seed in SEEDS]
    yield [arm("half", "study32", held, rate / 2, seed) for seed in SEEDS]
    yield [arm("double", "study32", held, rate * 2, seed) for seed in SEEDS]
    yield [arm(name, f"study32_{name}", held, rate, seed) for name in ("gamma1", "gamma0") for seed in SEEDS]
    sizes = {"n8": held * 4, "n128": max(1, held // 4)}
    yield [arm(name, f"study32_{name}", k, rate, seed) for name, k in sizes.items() for seed in SEEDS]
    # If there is time: the same at the baseline.
    yield [arm("half", "study32", 1, rate / 2, seed) for seed in SEEDS]
    yield [arm("double", "study32", 1, rate * 2, seed) for seed in SEEDS]
    yield [arm(name, f"study32_{name}", 1, rate, seed) for name in ("gamma1", "gamma0") for seed in SEEDS]


def finished(runs: Path, records: Path) -> dict[str, Run]:
    """Return the runs that are over, by name: done or diverged, committed or in the directory of runs."""
    found = {}
    places = [records / name for name in unpack(records / NAME)]
    for place in (*places, *sorted(path.parent for path in runs.glob("*/summary.json"))):
        if (read_summary(place) or {}).get("status") in ("done", "diverged"):  # the others are being written
            found.setdefault(place.name, load(place))
    return found


def known(found: Mapping[str, Run]) -> list[list[Planned]]:
    """Return the stages that are known so far."""
    seen: list[list[Planned]] = []
    for stage in stages(found):
        seen.append(stage)
        if any(planned.name not in found for planned in stage):
            break
    return seen


def run_all(jobs: int) -> None:
    """Run what is not over, ``jobs`` at a time. A signal ends the runs that are going, each with a checkpoint."""
    going: dict[str, subprocess.Popen[bytes]] = {}
    try:
        with ended_by_signals():
            failed = until_over(jobs, going)
    except (Ended, KeyboardInterrupt):
        for process in going.values():
            process.terminate()
        for process in going.values():
            process.wait()
        failed = [f"{name} was stopped" for name in going]
    if failed:
        sys.exit("study32: " + "; ".join(failed) + ". Started again, it goes on from the last checkpoint.")


def until_over(jobs: int, going: dict[str, subprocess.Popen[bytes]]) -> list[str]:
    """Keep ``jobs`` runs going until all are over, and return those that failed; after one of them nothing starts.

    Args:
        jobs: Runs at a time.
        going: The processes of runs, by name; changed in place. A run that diverges is a result, and has not failed.
    """
    failed: list[str] = []
    while True:
        ended = [name for name, process in going.items() if process.poll() is not None]
        if going and not ended:
            time.sleep(2)
            continue
        for name in ended:
            status = going.pop(name).returncode
            if status not in (0, DIVERGED):
                failed.append(f"{name} ended with status {status}")
        found = finished(RUNS, RECORDS)
        waiting = [one for stage in known(found) for one in stage if one.name not in found and one.name not in going]
        if not going and (failed or not waiting):
            return failed
        for planned in waiting[: 0 if failed else jobs - len(going)]:
            words = [*planned.words, *EVERY, f"run_dir={RUNS / planned.name}"]
            print(time.strftime("%Y-%m-%d %H:%M"), "largebatch train", *words, flush=True)
            going[planned.name] = subprocess.Popen([sys.executable, "-m", "largebatch", "train", *words])


def collect() -> None:
    """Copy the runs that are over and not yet among the records."""
    new = [name for name in finished(RUNS, RECORDS) if name not in unpack(RECORDS / NAME)]
    if new:
        words = [*(f"runs={RUNS / name}" for name in new), f"out={RECORDS}"]
        sys.exit(subprocess.run([sys.executable, "-m", "largebatch", "compact", *words]).returncode)


def show() -> None:
    """Print the runs that are known so far, with the error of each that is over."""
    found = finished(RUNS, RECORDS)
    for number, stage in enumerate(known(found), start=1):
        for planned in stage:
            run = found.get(planned.name)
            error = "" if run is None else f"{run.final_error:.2f} %" if run.final_error is not None else run.status
            print(f"{number:>3}  {planned.name:<24} {error:<10} {' '.join(planned.words)}")


def main() -> None:
    """Read the verb and the number of jobs."""
    verb, *more = sys.argv[1:] or ["help"]
    jobs = more[0].removeprefix("jobs=") if more else "1"
    if verb not in ("list", "run", "collect") or len(more) > 1 or not jobs.isdigit() or int(jobs) < 1:
        sys.exit(f"study32: it takes list, run, run jobs=2 or collect, not '{' '.join(sys.argv[1:])}'.\n\n{__doc__}")
    if verb == "run":
        run_all(int(jobs))
    elif verb == "collect":
        collect()
    else:
        show()


if __name__ == "__main__":
    main()
