"""Imports point down: a module may import only what lies on a lower layer, or in its own package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up. Modules on one line don't import one another.
LAYERS = (
    "schedule stats interrupt events files fused",
    "config",
    "placement lock",
    "record",
    "report",
    "world data batchnorm optim checkpoint progress memory launch",
    "models sweep",
    "evaluate exchange definition",
    "meter learner watchdog",
    "probe graph",
    "train",
    "compress",
    "explain certify evaluation predict bench",
    "quantize",
    "commands",
    "cli",
    "__main__",
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names.split()}
LIGHT = (
    "config",
    "events",
    "files",
    "lock",
    "placement",
    "schedule",
    "record",
    "stats",
    "interrupt",
    "report",
    "sweep",
    "predict",
)  # redraw figures on any laptop


def imports(path: Path) -> set[str]:
    """Return the full names of the modules that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files() -> list[Path]:
    return sorted(path for folder in ("largebatch", "hydra_plugins") for path in (ROOT / folder).rglob("*.py"))


def room(path: Path) -> str:
    """Return the module or package of ours that a file belongs to: ``data`` for largebatch/data/stream.py."""
    return path.relative_to(ROOT).with_suffix("").parts[1]


def test_every_module_has_a_layer():
    rooms = {room(path) for path in files() if path.parts[-2:] != ("largebatch", "__init__.py")}
    assert rooms <= {*HEIGHT, "largebatch_launchers"}


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    here = room(path)
    height = HEIGHT.get(here, HEIGHT["cli"])
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "largebatch":
            assert parts[1] == here or HEIGHT[parts[1]] < height, f"{here} imports {name}"
        if parts[0] in ("hydra", "omegaconf"):
            assert here in ("cli", "largebatch_launchers"), f"{here} imports {name}"
        if parts[0] == "triton":
            assert here in ("fused", "compress"), f"{here} imports {name}"
        if parts[0] in ("torch", "torchvision", "timm"):
            assert here not in (*LIGHT, "commands", "cli", "largebatch_launchers"), f"{here} imports {name}"


def test_the_lowest_layer_and_the_command_line_start_without_torch():
    light = [
        f"largebatch.{room(path)}"
        for path in files()
        if room(path) in (*LIGHT, "commands", "cli", "largebatch_launchers")
    ]
    light = [name.replace("largebatch.largebatch_launchers", "hydra_plugins.largebatch_launchers") for name in light]
    program = f"import sys, {', '.join(sorted(set(light)))}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
