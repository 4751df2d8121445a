"""Provenance of a run: code, versions, devices, command and hashes, and where its code was changed. No torch."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from largebatch.base.user_code import digests
from largebatch.config.run import Config
from largebatch.records.read import default_directory
from largebatch.runtime.placement import Placement

SCHEMA = 1
PACKAGES = ("torch", "torchvision", "timm", "numpy", "hydra-core", "omegaconf", "largebatch")
# The only variables that are recorded: anything else may hold a secret.
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NCCL_DEBUG",
    "CUBLAS_WORKSPACE_CONFIG",
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_NODELIST",
    "WORLD_SIZE",
)


def git_state(directory: Path) -> dict[str, Any]:
    """Return the commit of the code and whether it was changed since; nulls where it is not a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(directory), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed wheel may lie inside somebody else's checkout: only ours tracks this file.
    if git("ls-files", "--error-unmatch", str(Path(__file__))) is None:
        return {"commit": None, "dirty": None}
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def versions() -> dict[str, str]:
    """Return the versions of Python, of the packages that decide a result, and of NVIDIA's driver if there is one."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    with contextlib.suppress(OSError):  # there is no NVIDIA driver
        module = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
        found |= {"driver": module[1]} if module else {}
    return found


@dataclass(frozen=True)
class Run:
    """A run as it is handed to its processes: all that is decided before they start, computed once.

    ``directory`` is where it is recorded; ``experiment`` and the hashes are those of
    :meth:`~largebatch.config.run.Config.experiment` at the placement's precision.
    """

    config: Config
    placement: Placement
    directory: Path
    experiment: Mapping[str, Any]
    experiment_hash: str
    run_hash: str

    @classmethod
    def of(cls, config: Config, placement: Placement, directory: Path | None = None) -> Run:
        """Compute the hashes; ``directory`` is by default the one that the configuration names."""
        precision = placement.precision
        run_hash = config.run_hash(precision)
        directory = directory or Path(config.run_dir or default_directory(config, run_hash))
        return cls(
            config, placement, directory, config.experiment(precision), config.experiment_hash(precision), run_hash
        )


def provenance(run: Run, devices: list[str]) -> dict[str, Any]:
    """Return where a run comes from: code, versions, devices, command, hashes; the user's own code, where imported."""
    user_code = digests(run.config.user_code)
    return {
        "schema": SCHEMA,
        "experiment_hash": run.experiment_hash,
        "run_hash": run.run_hash,
        "experiment": run.experiment,
        "seed": run.config.seed,
        "placement": vars(run.placement),
        "git": git_state(Path(__file__).parent),
        "versions": versions(),
        "devices": devices,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": shlex.join(["largebatch", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        **({"user_code": user_code} if user_code else {}),
    }
