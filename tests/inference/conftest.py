import json
import shutil
import sys
from pathlib import Path

import pytest

from largebatch.cli import main as cli


@pytest.fixture
def runs(digits_runs, tmp_path, monkeypatch) -> Path:
    """Return a copy of the recorded runs that a test may spoil, and work beside it."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(digits_runs, tmp_path / "runs").relative_to(tmp_path)


@pytest.fixture
def call(monkeypatch, capsys):
    """Return a function that runs ``largebatch eval``: exit status, output and what was said."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["largebatch", "eval", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def facts(call):
    """Return a function that runs ``largebatch eval`` with format=json, and returns what it says."""

    def run(*words):
        status, out, err = call(*words, "format=json")
        assert status == 0, err
        return json.loads(out)

    return run
