"""Imports point down: a module may import only rooms on lower floors, or its own room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. Rooms on one floor don't import one another.
FLOORS = (
    "base",
    "config",
    "runtime cost_model data models offloading",
    "records quantization",
    "training reports",
    "launch",
    "inference verify bench",
    "cli",
    "__main__ hydra_plugins api",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
# Commands that only read records start without torch, on any laptop.
LIGHT = {"base", "config", "cost_model", "records", "reports", "cli", "hydra_plugins", "__main__"}
LIGHT_MODULES = {
    "largebatch.runtime.placement",
    "largebatch.runtime.lock",
    *(f"largebatch.launch.{name}" for name in ("run", "sweep", "arms", "manifest", "status", "arrays", "sbatch")),
}


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


def name_of(path: Path) -> str:
    """Return the module's full name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    """Return the room of a module: ``data`` of largebatch.data.stream; "" of the package itself."""
    first, *rest = name.split(".")
    return first if first == "hydra_plugins" else (rest or [""])[0]


def is_light(name: str) -> bool:
    return room(name) in LIGHT or name in LIGHT_MODULES


def test_every_room_has_a_floor():
    assert {room(name_of(path)) for path in files()} - {""} == {*FLOOR}
    assert len(FLOORS) <= 10
    assert len(FLOOR) <= 22


@pytest.mark.parametrize("name", [name_of(path) for path in files()])
def test_imports_point_down(name):
    path = ROOT / name.replace(".", "/")
    here, found = room(name), imports(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
    for other in found:
        if other.startswith("largebatch."):
            assert room(other) == here or FLOOR[room(other)] < FLOOR.get(here, len(FLOORS)), f"{name} imports {other}"
        package = other.split(".")[0]
        if package in ("hydra", "omegaconf"):
            assert here in ("cli", "hydra_plugins"), f"{name} imports {other}"
        if package == "triton":
            assert name.endswith("kernels") or here == "quantization", f"{name} imports {other}"
        if package in ("torch", "torchvision", "timm"):
            assert not is_light(name), f"{name} imports {other}"


def test_light_modules_load_without_torch():
    light = [name for name in map(name_of, files()) if is_light(name) and name != "largebatch.__main__"]
    program = f"import sys, {', '.join(light)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_a_name_of_a_module_is_used_twice_at_most():
    names = [path.stem for path in files() if path.stem not in ("__init__", "config")]
    assert {name for name in names if names.count(name) > 2} == set()
