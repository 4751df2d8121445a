"""Write a page for each command from its ``--help``, which is generated from the dataclasses of its keys."""

import contextlib
import io
import re
from pathlib import Path

from largebatch.cli.main import COMMANDS, run

VERBS = {
    "data": ("index", "verify", "stats"),
    "plot": ("curves", "scaling", "rates", "throughput", "probe"),
    "sweep": ("status", "resume", "cancel", "logs", "run"),
}
KEY = re.compile(r"^  ([\w.]+=\S*)(?:\s{2,}(.*)|\s(\S.*))?$")


def write_pages(directory: Path) -> None:
    """Write ``NAME.md`` of every command, and ``index.md`` with a list of them.

    Args:
        directory: Where the pages are written. A page whose text has not changed is left alone, so that Sphinx does
            not read it again.
    """
    directory.mkdir(exist_ok=True)
    lines = ["# Commands", ""]
    lines += ["`largebatch COMMAND --help` prints the same text. Keys are written `key=value`, in any order.", ""]
    for name, command in COMMANDS.items():
        lines += [f"[`largebatch {name}`]({name}.md)", f": {escaped(command.summary)}", ""]
        write(directory / f"{name}.md", page(name))
    lines += ["```{toctree}", ":hidden:", "", *COMMANDS, "```", ""]
    write(directory / "index.md", "\n".join(lines))


def write(path: Path, text: str) -> None:
    """Write a text where the file holds another."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def page(name: str) -> str:
    """Return the page of a command: its help, and that of each of its sub-commands."""
    parts = [f"# largebatch {name}", markdown(help_of(name))]
    for verb in VERBS.get(name, ()):
        parts += [f"## {name} {verb}", markdown(help_of(name, verb))]
    return "\n\n".join(parts) + "\n"


def help_of(*words: str) -> str:
    """Return what ``--help`` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run([*words, "--help"])
    return printed.getvalue().strip()


def markdown(text: str) -> str:
    """Turn a text of ``--help`` into Markdown: headings, lists of keys, examples as code, paragraphs."""
    return "\n\n".join(block(paragraph) for paragraph in re.split(r"\n\s*\n", text))


def block(paragraph: str) -> str:
    """Turn one paragraph of ``--help`` into Markdown."""
    first, *rest = paragraph.splitlines()
    if heading := re.fullmatch(r"== (.+?) ==", first):
        return f"**{escaped(heading[1])}**" + (f"\n\n{block(chr(10).join(rest))}" if rest else "")
    if first == "Examples:":
        return "**Examples**\n\n" + code(rest)
    if first.startswith("largebatch ") and not rest:
        return code([first])
    if KEY.match(first):
        return keys([first, *rest])
    if first.startswith("  "):
        return code([first, *rest])
    if re.match(r"\w+: \w", first) and any(re.match(r"\w+: ", line) for line in rest):  # the groups
        return "\n".join(("  " if line[0] == " " else "- ") + escaped(line.strip()) for line in (first, *rest))
    return escaped(" ".join(line.strip() for line in (first, *rest)))


def code(lines: list[str]) -> str:
    """Return lines as a block of code without their common indent."""
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    return "\n".join(["```text", *(line[indent:] for line in lines), "```"])


def keys(lines: list[str]) -> str:
    """Turn ``  key=value   text`` with its further lines into a definition list."""
    entries: list[tuple[str, list[str]]] = []
    for line in lines:
        if found := KEY.match(line):
            entries.append((found[1], [found[2] or found[3] or ""]))
        else:
            entries[-1][1].append(line.strip())
    return "\n\n".join(f"`{key}`\n: {escaped(' '.join(filter(None, words))) or '–'}" for key, words in entries)


def escaped(text: str) -> str:
    """Return a text with Markdown's own signs escaped, except between backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_<>\[\]#$|])", r"\\\1", part) for part in parts)
