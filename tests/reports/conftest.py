from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import EPOCHS, changed, ending, write_run


@pytest.fixture
def record(compose, tmp_path) -> Callable[..., Path]:
    """Return a function that writes a record below tmp_path/runs; k, n, error or errors, and settings by dotted key."""
    usual = {"epochs": EPOCHS, "n": 32, "warmup.name": "none"}

    def write(
        error: float | Sequence[float] = 10.0, settings: dict[str, Any] | None = None, parent: str = "runs", **more: Any
    ) -> Path:
        own = {key: more.pop(key) for key in ("k", "n", "seed") if key in more}
        errors = ending(error) if isinstance(error, float) else error
        return write_run(tmp_path / parent, changed(compose(), {**usual, **own, **(settings or {})}), errors, **more)

    return write
