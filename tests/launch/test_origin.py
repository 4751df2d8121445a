"""Which code a sweep was started with, and what is said when it is another."""

import pytest

from largebatch.base.errors import UserError
from largebatch.launch import origin
from largebatch.launch.origin import note_call, read_calls


@pytest.fixture
def code(monkeypatch):
    """Return a function that sets the commit, and what was changed since."""

    def state(commit: str, diff: str) -> None:
        monkeypatch.setattr(origin, "git_state", lambda directory: {"commit": commit, "dirty": bool(diff)})
        monkeypatch.setattr(origin, "_uncommitted", lambda: diff)

    return state


def test_code_that_changes_is_kept_and_told(code, compose, tmp_path):
    launcher = compose().launcher
    code("one", "+ a line\n")
    assert note_call(tmp_path, launcher) == []
    assert note_call(tmp_path, launcher) == []
    code("two", "+ another\n")
    assert note_call(tmp_path, launcher) == [
        'commit: "one" → "two"',
        'uncommitted changes: "code-0.diff" → "code-2.diff"',
    ]
    code("two", "")
    assert note_call(tmp_path, launcher) == ['uncommitted changes: "code-2.diff" → null']
    assert [call["diff"] for call in read_calls(tmp_path)] == ["code-0.diff", "code-0.diff", "code-2.diff", None]
    assert (tmp_path / "code-0.diff").read_text() == "+ a line\n"
    assert (tmp_path / "code-2.diff").read_text() == "+ another\n"
    assert read_calls(tmp_path)[0]["launcher"]["jobs"] == 1


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"sweep.json cannot be used .* restore it, or take it away"):
        read_calls(tmp_path)
