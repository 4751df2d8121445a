import functools
import importlib
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from largebatch.base import user_code
from largebatch.cli.compose import configuration_directory
from largebatch.config.run import Config

# Waiting threads that spin would take the cores from the processes that other tests have started.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton asks this when it is imported: without a GPU its interpreter runs the kernels.
if not (Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia").exists()):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts what runs in the background with SIGINT ignored, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine makes no test wrong: by default an example may take 200 ms.
hypothesis.settings.register_profile(
    "patient", hypothesis.settings(), deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")

# Also under --no-skips: no package brings a GPU, and `make peers` installs its group and runs what needs it.
MAY_BE_MISSING = ("there is no CUDA device", "uv sync --group bench")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips", action="store_true", help="a test that is skipped fails: here everything is installed"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first, so that no process waits at the end for another one."""
    items.sort(key=lambda item: item.get_closest_marker("acceptance") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if item.config.getoption("--no-skips") and report.skipped and not hasattr(report, "wasxfail"):
        _, _, reason = report.longrepr
        if not reason.endswith(MAY_BE_MISSING):
            report.outcome = "failed"
    return report


@pytest.fixture(autouse=True)
def one_thread():
    """Let small tensors be computed by one thread: sharing them out takes longer than they do."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture
def own_code(tmp_path, monkeypatch) -> Iterator[Callable[..., Path]]:
    """Return a function that writes a user's own modules, text by name, to an empty working directory."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(user_code, "_ROOTS", {})
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def write(**modules: str) -> Path:
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)  # of a text that is as long and as old
        return tmp_path

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@functools.cache  # composing takes a fifth of a second, and a configuration is frozen
def config_of(*overrides: str) -> Config:
    """Compose conf/ with Hydra as ``largebatch train`` does."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(version_base="1.3", config_dir=str(configuration_directory())):
        values = OmegaConf.to_container(compose("train", overrides=list(overrides)), resolve=True)
    values.pop("experiment", None)
    return Config.from_mapping(values)


@pytest.fixture(scope="session")
def compose() -> Callable[..., Config]:
    """Return a function from overrides to the typed configuration of ``largebatch train``."""
    return config_of


@pytest.fixture(scope="session")
def digits_runs(compose, tmp_path_factory) -> Path:
    """Return a directory of recorded runs on the digits: six of one epoch, seed0 … seed5, and one that was stopped.

    They learn enough to differ. ``stopped`` ended in the middle of its second epoch.
    """
    from largebatch.records.provenance import Run
    from largebatch.runtime.placement import Hardware, place
    from largebatch.training.loop import fit

    parent = tmp_path_factory.mktemp("digits")
    few = ("k=2", "n=16", "lr.base_minibatch=32", "warmup=none", "epochs=1", "threads=1", "device=cpu")
    wanted = {f"seed{seed}": (*few, f"seed={seed}") for seed in range(6)}
    wanted["stopped"] = (*few, "epochs=2", "iterations=60")
    for name, words in wanted.items():
        config = compose(*words)
        fit(Run.of(config, place(config, Hardware(cores=1, gpus=0, mps=False, bf16=False)), parent / name))
    return parent
