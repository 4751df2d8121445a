"""From the command line to the optimizer's step there are few calls of ours, and no function is long."""

import ast
import inspect
import sys
from pathlib import Path

import pytest
import torch

from largebatch.cli.main import main

PACKAGE = Path(__file__).parents[2] / "largebatch"
MOST_CALLS = 8
MOST_LINES = 80


def test_from_the_command_to_the_step_there_are_eight_calls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["largebatch", "train", "k=2", "n=4", "device=cpu", "threads=1", "iterations=1"])
    stack = []

    def watch(frame, event, _):
        if event == "call" and frame.f_code is step.__code__ and not stack:
            while frame is not None:
                stack.append((frame.f_code.co_filename, frame.f_code.co_qualname))
                frame = frame.f_back

    step = inspect.unwrap(torch.optim.SGD.step)
    sys.setprofile(watch)
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        sys.setprofile(None)
    assert end.value.code == 0
    ours = [name for file, name in reversed(stack) if Path(file).is_relative_to(PACKAGE)]
    assert (ours[0], ours[-1]) == ("main", "train_step")
    assert len(ours) <= MOST_CALLS, ours
    assert not any("hydra" in Path(file).parts for file, _ in stack)


def test_no_function_is_long():
    functions = [
        (node.end_lineno - node.lineno + 1, f"{path}:{node.lineno} {node.name}")
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [name for lines, name in functions if lines > MOST_LINES] == []
