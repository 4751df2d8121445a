"""The code of docs/python.md and of the notebooks runs, and the assertions of the notebooks hold."""

import json
import re
from pathlib import Path

import matplotlib
import pytest

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def code_of(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def test_there_are_three_notebooks_with_the_outputs_of_every_cell():
    assert [path.stem for path in NOTEBOOKS] == ["large_minibatches", "offloading", "quantization"]
    for path in NOTEBOOKS:
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
        assert sum(bool(cell["outputs"]) for cell in cells) >= 5
        assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])


@pytest.mark.slow
@pytest.mark.parametrize("path", [DOCS / "python.md", *NOTEBOOKS], ids=lambda path: path.name)
def test_the_code_of_a_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with matplotlib.rc_context({"backend": "agg"}):
        names: dict[str, object] = {}
        for number, code in enumerate(code_of(path)):
            exec(compile(code, f"{path.name}, block {number}", "exec"), names)
        matplotlib.pyplot.close("all") if "plt" in names else None
