import pytest

from largebatch.launch.manifest import Arm


@pytest.fixture
def arm(compose, tmp_path, monkeypatch):
    """Return a function from overrides to an arm; the working directory is an empty one."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: Arm(" ".join(words), compose(*words).to_mapping())
