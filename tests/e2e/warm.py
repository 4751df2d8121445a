"""The command in a process of its own that need not import PyTorch again: it is forked from one that has."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

# Nothing but imports happens in the server: no thread is started, and a fork is as good as a new process.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "hydra", "omegaconf", "largebatch.cli.main", "largebatch.launch.run", __name__])


def command(
    arguments: tuple[str, ...], directory: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run ``largebatch`` with ``arguments`` in ``directory``, and return its output and status."""
    printed = [directory.parent / f"{directory.name}.{name}" for name in ("out", "err")]
    process = SERVER.Process(target=_main, args=(arguments, directory, environment, printed))
    process.start()
    process.join()
    out, err = (path.read_text() for path in printed)
    return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def _main(arguments: tuple[str, ...], directory: Path, environment: dict[str, str], printed: list[Path]) -> None:
    for number, path in enumerate(printed, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(Path(sys.executable).with_name("largebatch")), *arguments]
    from largebatch.cli.main import main

    main()
