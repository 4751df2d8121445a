import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import warm
from processes import Run

Done = subprocess.CompletedProcess[str]


@pytest.fixture
def largebatch(tmp_path) -> Callable[..., Done]:
    """Return a function that runs the command in an empty directory, and returns its output and status.

    Where the environment is another one, the interpreter starts anew.
    """

    def run(*arguments: str, **environment: str) -> Done:
        if not environment:
            return warm.command(arguments, tmp_path, dict(os.environ))
        return subprocess.run(
            [Path(sys.executable).with_name("largebatch"), *arguments],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Run]]:
    runs = []

    def begin(*arguments: str) -> Run:
        runs.append(Run(tmp_path, *arguments))
        return runs[-1]

    yield begin
    for run in runs:
        run.process.kill()  # nothing, where it has ended
        run.process.wait()
        run.process.stderr.close()
