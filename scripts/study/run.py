"""Run the study of results/study, and write the page of it. Stopped and started again, it goes on.

    python scripts/study/run.py                 # all of it, in runs/study
    python scripts/study/run.py --quick         # ten minutes of it, in runs/study-quick
    python scripts/study/run.py launcher.jobs=4 device=cuda    # further words go to every run

It first says how many images there are to compute, and how long that takes here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from evidence import Evidence, claims
from part import take_first
from plan import FULL, QUICK, Size, named
from write import page

from largebatch.base.errors import UserError
from largebatch.base.outcome import DIVERGED
from largebatch.records.runs import load


def largebatch(*words: str) -> None:
    """Run the command of this Python; end as it ends where it fails. A run that diverges is a result."""
    status = subprocess.run([sys.executable, "-m", "largebatch", *words]).returncode
    if status not in (0, DIVERGED):
        sys.exit(status)


def state_budget(size: Size, words: dict[str, str]) -> None:
    """Time an epoch of kn = 256, and say what all of the study will take."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory, "run")
        of_the_run = [f"{key}={value}" for key, value in words.items() if not key.startswith(("launcher.", "hydra."))]
        iterations = 2 * size.train_images // 256  # the second epoch is timed: the first one warms up
        largebatch("train", f"experiment={named(256)}", f"iterations={iterations}", f"run_dir={run}", *of_the_run)
        speed = float(load(run).epochs["images_per_second"][-1])
    jobs = int(words["launcher.jobs"])
    images = size.runs * size.epochs * size.train_images
    print(
        f"{len(size.arms)} experiments, {size.runs} runs × {size.epochs} epochs × {size.train_images:,} images = "
        f"{images / 1e6:,.1f} million images. At {speed:,.0f} images/s a run, {jobs} at once: at "
        f"least {images / speed / jobs / 60:,.0f} minutes of training, and validation.",
        flush=True,
    )


def words_for(size: Size, root: Path, asked: list[str]) -> dict[str, str]:
    """Return what every run is told: by default as many runs at once as there are cores, a thread each."""
    words = {
        "dataset.root": str(root),
        "threads": "1",
        "channels_last": "true",
        "loader.workers": "0",
        "launcher.jobs": str(os.cpu_count() or 1),
        **size.words,
    }
    for word in asked:
        key, equals, value = word.partition("=")
        if not equals:
            sys.exit(f"study: '{word}' is not key=value: further words are overrides for every run.")
        words[key] = value
    return words


def main() -> None:
    """Make the data, state the budget, run the sweep, and say what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ten minutes of it: two claims, fewer epochs")
    parser.add_argument("--directory", type=Path, help="of the sweep; by default runs/study, or runs/study-quick")
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides for every run")
    asked = parser.parse_args()
    size = QUICK if asked.quick else FULL
    directory = asked.directory or Path("runs", "study-quick" if asked.quick else "study")
    words = words_for(size, directory / "data", asked.words)
    try:
        take_first(directory / "data", size.train_images, size.val_images)
    except UserError as error:
        sys.exit(f"study: {error}")
    state_budget(size, words)
    for arms, seeds in size.sweeps:
        experiments, numbers = f"experiment={','.join(arms)}", f"seed={','.join(map(str, seeds))}"
        overrides = [f"{key}={value}" for key, value in words.items()]
        largebatch("train", "-m", experiments, numbers, f"hydra.sweep.dir={directory}", *overrides)
    if asked.quick:
        for claim, holds in claims(Evidence.of(directory), size.margin).items():
            print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    else:
        page(directory, directory / "page")


if __name__ == "__main__":
    main()
