"""With which words and which code a sweep was planned: ``sweep.json``, and what of the code was not committed.

``sweep.json`` holds ``schema`` and ``calls``, one for each time that the sweep was planned or resumed: ``started``,
``command``, ``launcher`` (its settings), ``git`` (as in a run's provenance), ``diff`` (a file beside it with what was
changed since the commit, or null) and ``versions``.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from largebatch.base.errors import UserError
from largebatch.config.launchers import LauncherConfig
from largebatch.records.provenance import SCHEMA, git_state, versions
from largebatch.records.read import differences
from largebatch.records.write import write_json

CODE = Path(__file__).parent


def note_call(directory: Path, launcher: LauncherConfig) -> list[str]:
    """Add this call to ``sweep.json``, and return what of the code changed since the last one, in words.

    Raises:
        UserError: ``sweep.json`` was damaged.
    """
    calls = read_calls(directory)
    git = git_state(CODE)
    changed = _uncommitted() if git["dirty"] else ""
    before = calls[-1] if calls else None
    name = before["diff"] if before else None
    if name and not ((directory / name).is_file() and (directory / name).read_text(encoding="utf-8") == changed):
        name = None
    if changed and name is None:
        name = f"code-{len(calls)}.diff"
        (directory / name).write_text(changed, encoding="utf-8")
    call: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["largebatch", *sys.argv[1:]]),
        "launcher": dataclasses.asdict(launcher),
        "git": git,
        "diff": name,
        "versions": versions(),
    }
    write_json(directory / "sweep.json", {"schema": SCHEMA, "calls": [*calls, call]})
    return differences(_code(before), _code(call)) if before else []


def read_calls(directory: Path) -> list[dict[str, Any]]:
    """Return the calls that planned or resumed a sweep, the first one first.

    Raises:
        UserError: ``sweep.json`` was damaged.
    """
    path = directory / "sweep.json"
    try:
        calls = json.loads(path.read_text(encoding="utf-8"))["calls"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be used ({error!r}): restore it, or take it away.") from None
    return list(calls)


def _code(call: dict[str, Any]) -> dict[str, Any]:
    """Return what of a call says which code it ran."""
    return {"commit": call["git"]["commit"], "uncommitted changes": call["diff"], **call["versions"]}


def _uncommitted() -> str:
    """Return what of the code was changed since its commit; files that git does not know are not in it."""
    done = subprocess.run(["git", "-C", str(CODE), "diff", "HEAD"], capture_output=True, check=True)
    return done.stdout.decode(errors="replace")
