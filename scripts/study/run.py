"""Run the study of results/study: its experiments, three seeds each, and its page of them. Stopped, it goes on.

    python scripts/study/run.py                 # all of it, in runs/study
    python scripts/study/run.py --quick         # ten minutes of it, in runs/study-quick
    python scripts/study/run.py DIRECTORY launcher.jobs=1 device=cuda    # elsewhere; further words go to every run

It first says how many images there are to compute, and how long that takes here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from plan import FULL, QUICK, Size

from data import take_first
from largebatch.data.sets import DEBIAN_FASHION
from largebatch.report.runs import load

HERE = Path(__file__).parent


def largebatch(*words: str) -> None:
    """Run the command of this Python; end as it ends where it fails."""
    status = subprocess.run([sys.executable, "-m", "largebatch", *words]).returncode
    if status:
        sys.exit(status)


def state_budget(size: Size, words: list[str], jobs: int) -> None:
    """Time an epoch of the baseline, and say what all of the study will take."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory, "run")
        words = [word for word in words if not word.startswith(("launcher.", "hydra."))]
        iterations = f"iterations={2 * size.train_images // 256}"  # the second epoch is timed: the first one warms up
        largebatch("train", f"experiment={size.arms[0]}", iterations, f"run_dir={run}", *words)
        speed = float(load(run).epochs["images_per_second"][-1])
    runs = len(size.arms) * len(size.seeds)
    images = runs * size.epochs * size.train_images
    hours = images / speed / jobs / 3600
    print(
        f"{len(size.arms)} experiments × {len(size.seeds)} seeds × {size.epochs} epochs × {size.train_images:,} images "
        f"= {images / 1e6:,.1f} million images; at {speed:,.0f} images/s a run, {jobs} at once: {hours:.1f} hours, and "
        "validation."
    )


def main() -> None:
    """Make the data, state the budget, sweep, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ten minutes of it: two claims, fewer epochs")
    parser.add_argument("directory", type=Path, nargs="?", help="of the sweep; by default runs/study or …-quick")
    parser.add_argument("words", nargs="*", help="key=value, for every run")
    asked = parser.parse_args()
    size = QUICK if asked.quick else FULL
    directory = asked.directory or Path("runs", "study-quick" if asked.quick else "study")
    root = directory / "data"
    take_first(DEBIAN_FASHION, root, size.train_images, size.val_images)
    jobs = os.cpu_count() or 1
    # On a processor: as many runs at once as it has cores, a thread each. What is asked for comes later, and wins.
    here = ["threads=1", "channels_last=true", "loader.workers=0", f"launcher.jobs={jobs}"]
    words = [f"dataset.root={root.resolve()}", *here, *size.words, *asked.words]
    state_budget(size, words, jobs)
    names, seeds = ",".join(size.arms), ",".join(map(str, size.seeds))
    largebatch("train", "-m", f"experiment={names}", f"seed={seeds}", f"hydra.sweep.dir={directory}", *words)


if __name__ == "__main__":
    main()
