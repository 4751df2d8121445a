"""A command imports only what its run uses: PyTorch's compiler alone takes as long to import as PyTorch."""

import os
import subprocess
import sys

import pytest

import largebatch

HEAVY = (
    "torchvision",
    "timm",
    "sklearn",
    "scipy",
    "pandas",
    "matplotlib",
    "sympy",
    "onnx",
    "onnxruntime",
    "torch._dynamo",
    "torch._inductor",
    "torch.fx.experimental.symbolic_shapes",
)
# Runs first in every Python process, and writes the name of every module that is looked for.
LOGGER = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in HEAVY:
            with open(os.path.join(os.environ["IMPORTS"], name), "a") as file:
                print(" ".join(sys.orig_argv), file=file)

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def heavy_imports(tmp_path):
    """Return a function that runs a command, and returns the heavy modules that any of its processes imported."""
    (tmp_path / "sitecustomize.py").write_text(f"HEAVY = {HEAVY}\n{LOGGER}")
    names = tmp_path / "names"
    names.mkdir()

    def run(*words):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "IMPORTS": str(names), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", "largebatch", *words]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return {path.name for path in names.iterdir()}

    return run


@pytest.mark.parametrize(
    ("words", "used"),
    [
        ("--help", set()),
        ("explain", set()),
        pytest.param("explain experiment=imagenet_1h", HEAVY, marks=pytest.mark.slow),
        ("train epochs=1", set()),
        pytest.param("train epochs=1 k=2 processes=2 exact=true", set(), marks=pytest.mark.slow),
    ],
)
def test_only_what_a_run_uses_is_imported(heavy_imports, words, used):
    assert heavy_imports(*words.split()) <= {*used}


def test_public_names_are_imported_when_they_are_used():
    program = "import sys, largebatch; early = 'torch' in sys.modules; largebatch.offload; sys.exit(early)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert {*largebatch.__all__} <= {*dir(largebatch)}
    assert all(getattr(largebatch, name) for name in largebatch.__all__)
    unknown = "onload"
    with pytest.raises(AttributeError, match="no attribute 'onload'"):
        getattr(largebatch, unknown)
