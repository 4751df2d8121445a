"""docs/architecture.md and docs/migration.md name rooms, floors and modules as the code has them."""

import re
from pathlib import Path

import pytest
from test_imports import FLOORS, LIGHT

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "largebatch"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MIGRATION = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")


def table(text: str, head: str) -> list[list[str]]:
    """Return the rows of the table whose first row is ``head``."""
    body = text.split(f"{head}\n", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()[1:]]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def exists(module: str) -> bool:
    path = PACKAGE / module.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_every_floor_is_named_with_its_rooms():
    floors = table(ARCHITECTURE, "| floor | rooms |")
    assert [(int(number), words(rooms)) for number, rooms in floors] == list(
        enumerate(rooms.split() for rooms in FLOORS)
    )


def test_every_room_has_a_line_that_says_whether_it_needs_torch():
    rows = table(ARCHITECTURE, "| room | what it does | torch |")
    assert [room for cell, _, _ in rows for room in words(cell)] == " ".join(FLOORS).split()
    assert {words(cell)[0] for cell, _, torch in rows if torch == "no"} == LIGHT
    assert all(what for _, what, _ in rows)


def test_modules_on_the_page_exist_and_have_the_functions_named_beside_them():
    for name in re.findall(r"`([\w/]+\.py)`", ARCHITECTURE):
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), name
    calls = re.findall(r"^\d\. `([\w/]+\.py)`, `(?:\w+\.)?(\w+)`", ARCHITECTURE, re.M)
    assert len(calls) == 8
    for name, function in calls:
        assert f"def {function}(" in (PACKAGE / name).read_text(encoding="utf-8"), function


@pytest.mark.parametrize("row", table(MIGRATION, "| before | now |"), ids=lambda row: row[0])
def test_every_old_name_has_a_new_one(row):
    before, now = map(words, row)
    assert len(before) == 1
    assert now
    assert all(map(exists, now))
    if before != ["sweep"]:  # now the command's name too
        assert before[0] in now or not exists(before[0]) or before[0] in ("config", "cli"), before


def test_the_vocabulary_is_whole():
    defined = {word for word, _ in table(ARCHITECTURE, "| word | meaning |")}
    assert {"worker", "process", "pass", "step", "minibatch", "run", "sweep", "task", "record", "artifact"} < defined
    assert "reference rate" in defined
