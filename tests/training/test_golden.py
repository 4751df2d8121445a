"""A refactor that moves the loss of a short float64 run by more than 1e-9 has changed the experiment."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "golden.py"


def test_golden_run(tmp_path):
    specification = importlib.util.spec_from_file_location("golden", SCRIPT)
    golden = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(golden)
    expected = json.loads(golden.FILE.read_text())
    assert expected["command"].split()[2:] == golden.ARGUMENTS
    assert golden.losses(tmp_path / "run") == pytest.approx(expected["losses"], rel=1e-9)
