"""What is read from files is data: nothing is unpickled, and nothing of the environment is recorded unasked."""

import ast
from pathlib import Path

import pytest

from largebatch.records.provenance import ENVIRONMENT

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("largebatch", "hydra_plugins", "scripts") for path in (ROOT / folder).rglob("*.py"))
# Each can run what a file says.
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
CALLS = {"torch.load", "numpy.load", "np.load", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "eval", "exec"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & MODULES, path
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in MODULES, path
        elif isinstance(node, ast.Call):
            called = ast.unparse(node)
            plain = called.startswith("np.load(") and called.endswith(", allow_pickle=False)")
            assert plain or ast.unparse(node.func) not in CALLS, f"{path}: {called}"


def test_variables_that_are_recorded_are_named_one_by_one():
    assert not [name for name in ENVIRONMENT if any(word in name for word in ("KEY", "TOKEN", "SECRET", "PASS", "*"))]
