import os
import sys

from largebatch.base.outcome import Unbreakable, say


def test_a_reader_that_leaves_fails_nobody(monkeypatch):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", Unbreakable.of(stream))
        monkeypatch.delenv("RANK", raising=False)
        say("heard")
        assert os.read(reader, 100) == b"heard\n"
        os.close(reader)
        for _ in range(3):
            say("lost")
        assert not sys.stderr.isatty()
        assert sys.stderr.fileno() == writer
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, writer)  # so that closing the stream, with the lines it still holds, fails no test
        os.close(null)
