"""Bars, and lines that are drawn again in place."""

import io
import os
import sys
from types import SimpleNamespace

import pytest

from largebatch.base import progress
from largebatch.base.progress import Redrawn


def test_lines_are_drawn_in_the_place_of_the_last_ones_and_cut(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((6, 3)))
    stream = io.StringIO()
    lines = Redrawn(stream)
    lines.clear()
    assert stream.getvalue() == ""
    lines.show("one\ntwo")
    lines.show("longer\nb\nc")  # of six columns the last stays free, of three lines too
    lines.clear()
    lines.clear()
    up = "\x1b[2F\x1b[J"
    assert stream.getvalue() == f"one\ntwo\n{up}long…\nb\n{up}"


@pytest.mark.parametrize(("kernel", "shown"), [("IPKernelApp", True), ("TerminalIPythonApp", False)])
def test_a_notebook_shows_a_bar(kernel, shown, monkeypatch, capsys):
    shell = SimpleNamespace(config={kernel: {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(progress, "notebook_bar", lambda: progress.tqdm)  # without widgets
    bar = progress.Progress(4, 0, [].append)
    bar.update(1, 0.5, 0.1, 2.0, 80.0, 16)
    bar.say("epoch 1")
    bar.close()
    text = capsys.readouterr().err
    assert "epoch 1\n" in text
    assert ("4/4" in text or "1/4" in text or "/4 [" in text) is shown
