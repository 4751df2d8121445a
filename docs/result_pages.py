"""Write a page for each study in ``results/`` from its README, with links that hold inside the documentation."""

import re
from pathlib import Path

from command_pages import write

TITLES = {
    "study": "The paper's experiments on two cores",
    "digits": "Minibatch size on the digits",
    "pitfalls": "Cost of each pitfall",
    "probe": "How large a batch: answers and training",
    "predict": "Predicted and measured time",
    "bench": "Speed",
    "reliability": "Runs under faults",
    "quantize": "Accuracy and speed of integers",
    "zoo": "Networks of torchvision and timm",
}
LINK = re.compile(r"\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def write_pages(root: Path, directory: Path) -> None:
    """Write the page of every study, and of the tables in the directory of its README.

    Args:
        root: The repository.
        directory: Where the pages are written, two levels below ``root``.
    """
    directory.mkdir(exist_ok=True)
    for name in TITLES:
        for path in sorted((root / "results" / name).glob("*.md")):
            write(directory / page_of(path), linked(path.read_text(encoding="utf-8"), path, root))
    write(directory / "index.md", index())


def index() -> str:
    """Return the list of the studies."""
    lines = [
        "# Results",
        "",
        "Every number comes from committed records in `results/`. `make results` draws the tables",
    ]
    lines += ["and figures again from them.", ""]
    lines += [f"- [{title}]({name}.md)" for name, title in TITLES.items()]
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *TITLES, "```", ""])


def page_of(path: Path) -> str:
    """Return the name of the page of ``results/NAME/README.md`` or of another text there."""
    return f"{path.parent.name}.md" if path.stem == "README" else f"{path.parent.name}-{path.stem}.md"


def linked(text: str, path: Path, root: Path) -> str:
    """Return the text of a page with links to pages, and to files of the repository; others become plain text."""

    def target(found: re.Match[str]) -> str:
        place = (path.parent / found[1]).resolve()
        place = place / "README.md" if (place / "README.md").is_file() else place
        if place.suffix == ".md" and place.parent.name in TITLES and place.is_file():
            return f"]({page_of(place)}{found[2] or ''})"
        return f"](../../{place.relative_to(root.resolve())})" if place.is_file() else "](#results-directory)"

    text = LINK.sub(target, text)
    text = re.sub(r"\[([^]]*)\]\(#results-directory\)", r"\1", text)
    # A heading of the first level is the title; those that follow it are sections.
    first, _, rest = text.partition("\n")
    rest = re.sub(r"^(#+ )", r"#\1", rest, flags=re.MULTILINE) if re.search(r"^# ", rest, re.MULTILINE) else rest
    orphan = "---\norphan: true\n---\n" if path.stem != "README" else ""
    return f"{orphan}{first}\n{rest}"
