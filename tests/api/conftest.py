"""Provide the tests of the Python API with the arguments of a run that takes half a second."""

import pytest

import largebatch


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    return [
        *("dataset=synthetic_small", "dataset.height=8", "dataset.width=8", "dataset.train_images=66"),
        *("dataset.val_images=20", "k=2", "n=8", "lr.base_minibatch=16", "epochs=2", "warmup=none", "device=cpu"),
        *("threads=1", "log_every=1"),
    ]


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory) -> largebatch.Run:
    """Return a run that was trained from Python."""
    return largebatch.train(*tiny, run_dir=tmp_path_factory.mktemp("api") / "run", progress=False)
