"""Versions agree, actions are pinned to commits, the image has no root, and the README is one page."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_changelog_and_citation_are_of_this_version():
    newest = re.search(r"^## \[(\S+)\] - (\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.M)
    citation = yaml.safe_load(text("CITATION.cff"))
    assert newest[1] == citation["version"] == PROJECT["version"]
    assert newest[2] == str(citation["date-released"])
    assert citation["references"][0]["url"] == PROJECT["urls"]["Paper"]


def test_the_readme_is_one_page():
    assert len(text("README.md").splitlines()) <= 150


def test_every_action_is_pinned_to_a_commit():
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used)


def test_the_workflow_runs_targets_that_exist_on_every_python():
    assert WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["requires-python"] == ">=3.11"
    targets = " ".join(step["run"] for step in STEPS if step.get("run", "").startswith("make "))
    assert {"lint", "type", "test", "docs"} <= {*targets.split()}
    subprocess.run(["make", "-n", "lint", "type", "test", "docs"], cwd=ROOT, check=True, capture_output=True)


def test_the_image_takes_its_base_as_an_argument_and_has_no_root():
    lines = DOCKERFILE.splitlines()
    assert lines.index("ARG BASE=nvidia/cuda:13.2.0-runtime-ubuntu24.04") < lines.index("FROM ${BASE}")
    (user,) = re.findall(r"^USER (.+)$", DOCKERFILE, re.M)
    assert user == "${UID}"
    assert re.search(r"^ARG UID=[1-9]\d*$", DOCKERFILE, re.M)
    assert lines[-2:] == ['ENTRYPOINT ["largebatch"]', 'CMD ["--help"]']


@pytest.mark.parametrize("sources", re.findall(r"^COPY --chown=largebatch (.+) \S+$", DOCKERFILE, re.M))
def test_what_the_image_copies_exists_and_is_not_ignored(sources):
    allowed = {line[1:] for line in text(".dockerignore").splitlines() if line.startswith("!")}
    for source in sources.split():
        assert (ROOT / source).exists()
        assert source in allowed


def test_files_of_tests_have_names_of_their_own():
    """Pytest imports them by name: two of one name stop the collection of all."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted({*names})
