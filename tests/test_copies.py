"""Copies that go on behind the program's back: only from pinned memory, and only to CUDA."""

import ast
from pathlib import Path

import torch

from largebatch.data.source import upload

PACKAGE = Path(__file__).parents[1] / "largebatch"
# upload() looks at the device; the ring of the offloader lives on CUDA streams, and its sources are pinned.
ALLOWED = {("data/source.py", "upload"), ("offloading/transport.py", "copy")}


def test_no_other_copy_is_asynchronous():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                keywords = {node.arg for node in ast.walk(function) if isinstance(node, ast.keyword)}
                if "non_blocking" in keywords:
                    found.add((path.relative_to(PACKAGE).as_posix(), function.name))
    assert found == ALLOWED


def test_a_copy_to_any_other_device_waits():
    asked = {}

    class Watched(torch.Tensor):
        def to(self, *arguments, **options):
            asked[str(arguments[0])] = options["non_blocking"]
            return self

        def is_pinned(self):
            return True

    values = torch.zeros(3).as_subclass(Watched)
    for device in ("cpu", "mps", "cuda"):
        upload(values, torch.device(device))
    assert asked == {"cpu": False, "mps": False, "cuda": True}
    upload(torch.zeros(3), torch.device("cpu"))
