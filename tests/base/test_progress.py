"""Lines that are drawn again in place."""

import io
import os

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
