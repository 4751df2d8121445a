"""The generated pages of the commands hold what ``--help`` prints."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from largebatch.cli.main import COMMANDS
from largebatch.config.run import Config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("command_pages", ROOT / "docs" / "command_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_has_a_page_in_the_list(pages, tmp_path):
    pages.write_pages(tmp_path)
    index = (tmp_path / "index.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert (tmp_path / f"{name}.md").read_text(encoding="utf-8").startswith(f"# largebatch {name}\n")
        assert f"({name}.md)" in index


def test_the_page_of_train_defines_every_key_with_its_default(pages):
    text = pages.page("train")
    assert "`k=8`\n: Number of workers: a minibatch has k × n samples, and the learning rate is scaled with it." in text
    assert all(f"`{key}=" in text for key in Config.__dataclass_fields__ if f"{key}." not in text)
    assert "- optimizer: adamw, lamb, lars, python, sgd" in text


def test_help_becomes_markdown(pages):
    text = """Do a_thing.

  a.key=        One of *, <b>.
                By default `x_y`.
  other=1       –

Examples:
  largebatch table runs=a
      what it does"""
    assert pages.markdown(text) == (
        "Do a\\_thing.\n\n`a.key=`\n: One of \\*, \\<b\\>. By default `x_y`.\n\n`other=1`\n: –\n\n"
        "**Examples**\n\n```text\nlargebatch table runs=a\n    what it does\n```"
    )


def test_a_page_that_has_not_changed_is_left_alone(pages, tmp_path):
    page = tmp_path / "page.md"
    pages.write(page, "text\n")
    page.chmod(0o444)
    before = page.stat().st_mtime_ns
    pages.write(page, "text\n")
    assert page.stat().st_mtime_ns == before


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= {*index}


def documented():
    """Yield the place and the docstring of every module, and of every public class and function in it."""
    for path in sorted((*ROOT.glob("largebatch/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'module')}", text


def test_no_docstring_begins_with_a_question_word():
    assert [place for place, text in documented() if re.match(r"(What|Where|Which|How|Who|Whose|When)\b", text)] == []
