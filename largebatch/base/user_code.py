"""Import and call the user's own code, named as module:callable, and word its errors with its own frames."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from largebatch.base.errors import Fault, UserError, nearest

MODELS, DATASETS = "largebatch.models", "largebatch.datasets"  # groups of entry points
OURS = Path(__file__).resolve().parents[1]
_ROOTS: dict[Path, str] = {}  # folders and files of imported code, with the key=value that named it


def plugins(group: str) -> dict[str, str]:
    """Return what installed packages offer under a group of entry points: ``module:callable`` by name."""
    return {entry.name: entry.value for entry in sorted(metadata.entry_points(group=group))}


def load(key: str, name: str, group: str = "") -> Callable[..., Any]:
    """Import a callable.

    Args:
        key: The key of the configuration that names it.
        name: ``package.module:callable``; the working directory is importable, as under ``python -m``.
        group: Entry points of installed packages; their names are allowed too.

    Raises:
        UserError: there is no such callable, or importing it fails.
    """
    module_name, attribute = _target(key, name, group)
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):  # she imports what is not there
            _ROOTS.setdefault(Path.cwd(), f"{key}={name}")
            raise _worded(error, f"{key}={name} cannot be imported") from error
        raise UserError(
            f"{key}={name}: there is no module {error.name} in this directory ({Path.cwd()}), nor among the installed "
            "packages. Run the command where the module lies, or install its package."
        ) from None
    except Exception as error:  # whatever her module raises
        _ROOTS.setdefault(Path.cwd(), f"{key}={name}")
        raise _worded(error, f"{key}={name} cannot be imported") from error
    _ROOTS.setdefault(_root(module_name), f"{key}={name}")
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"{key}={name}: {module.__file__} has no '{part}'.{nearest(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{key}={name} is not callable, but of type {type(found).__name__}: name a function or class.")
    return found  # type: ignore[no-any-return]


def _target(key: str, name: str, group: str) -> tuple[str, str]:
    """Return the names of module and callable."""
    offered = plugins(group) if group else {}
    module, _, attribute = offered.get(name, name).partition(":")
    if module and attribute:
        return module, attribute
    installed = f", or the name of a plug-in ({', '.join(offered) or 'none is installed'})" if group else ""
    given = f"{key}={name} is not known" if name not in ("", "null") else f"{key} is missing"
    raise UserError(f"{given}: it takes module:callable, such as {key}=my_package.mine:make{installed}.")


def _root(module_name: str) -> Path:
    """Return the folder of a module's package; of a single file its folder, or among installed packages the file."""
    top = sys.modules[module_name.partition(".")[0]]
    path = Path(top.__file__ or next(iter(top.__path__))).resolve()
    if path.name == "__init__.py" or path.is_dir():
        return path.parent if path.is_file() else path
    return path if "site-packages" in path.parts else path.parent


def _belongs(file: str, root: Path) -> bool:
    """Whether a source file is the user's: below a folder of imported code, and not a package installed there."""
    path = Path(file).resolve()
    if not path.is_relative_to(root) or path.is_relative_to(OURS):
        return False
    return "site-packages" not in path.relative_to(root).parts


@contextlib.contextmanager
def calling(call: str, expected: str) -> Iterator[None]:
    """Word whatever a call of the user's code raises.

    Args:
        call: Which callable: ``key=value``.
        expected: How it is called and what it has to return, as the end of a sentence after "It is".

    Raises:
        UserError: one sentence, and the traceback of the user's own frames.
    """
    try:
        yield
    except (UserError, Fault):
        raise
    except Exception as error:  # whatever the user's code raises
        raise _worded(error, call, f" It is {expected}.") from error


@contextlib.contextmanager
def worded() -> Iterator[None]:
    """Word what comes out of the user's code within ``with``; see :func:`blamed`."""
    try:
        yield
    except (UserError, Fault):
        raise
    except Exception as error:  # whatever the user's code raises
        if mine := blamed(error):
            raise mine from error
        raise


def blamed(error: BaseException, expected: str = "") -> UserError | None:
    """Return the sentence of an exception that came out of the user's code; None where none of its frames are there."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    found = next((named for file in reversed(files) for root, named in _ROOTS.items() if _belongs(file, root)), None)
    return _worded(error, found, expected) if found else None


def _worded(error: BaseException, call: str, expected: str = "") -> UserError:
    frames = traceback.extract_tb(error.__traceback__)
    hers = [frame for frame in frames if any(_belongs(frame.filename, root) for root in _ROOTS)]
    said = " ".join(str(error).split())
    trace = "".join(traceback.format_list(hers)).rstrip()
    if isinstance(error, SyntaxError):
        trace = "".join(traceback.format_exception_only(error)).rstrip()
    sentence = f"{call}: {type(error).__name__}{': ' if said else ''}{said.rstrip('.')}.{expected}"
    return UserError(f"{sentence}\n{trace}" if trace else sentence)


def digests(named: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return where imported code lies and what it is, by key.

    Args:
        named: ``module:callable`` by key of the configuration.

    Returns:
        For each key ``name``, ``file`` and ``sha256`` (the first 16 digits), the latter by file: of its module and of
        all modules of the same package or folder that are imported.
    """
    groups = {"model.name": MODELS, "dataset.name": DATASETS}
    found = {}
    for key, name in named.items():
        module_name, _ = _target(key, name, groups.get(key, ""))
        if module_name not in sys.modules:
            continue
        root = _root(module_name)
        folder = root.parent if root.is_file() else root
        files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
        hers = sorted(file for file in files if file and _belongs(file, root) and Path(file).is_file())
        found[key] = {
            "name": name,
            "file": str(sys.modules[module_name].__file__),
            "sha256": {str(Path(file).resolve().relative_to(folder)): _sha256(Path(file)) for file in hers},
        }
    return found


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
