"""The arms of a sweep in this process, one after another: one's failure is shown, and leaves the others alone."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from largebatch.base.errors import Fault, UserError
from largebatch.base.files import DISK_TROUBLE
from largebatch.base.outcome import DIVERGED, FAULT, MISTAKE, Outcome, say
from largebatch.base.signals import ENDED, INTERRUPTED
from largebatch.launch.manifest import Arm


def one_by_one(run: Callable[[dict[str, Any]], Outcome], arms: Sequence[Arm]) -> int:
    """Call ``run`` with the values of every arm, and return the exit status of all."""
    statuses = []
    for number, arm in enumerate(arms, start=1):
        say(f"── {number} of {len(arms)}: {arm.words}")
        statuses.append(attempt(partial(run, dict(arm.values))).status)
        if statuses[-1] in (INTERRUPTED, ENDED):
            break
    return exit_status(statuses)


def attempt(work: Callable[[], Outcome]) -> Outcome:
    """Return what one arm comes to, its failure included; that is said here, with a traceback where it is a bug."""
    try:
        return work()
    except UserError as error:
        say(f"largebatch: {error}")
        return Outcome(MISTAKE, summary={"status": "failed"})
    except Fault as error:
        say(f"largebatch: {error}")
    except KeyboardInterrupt:
        return Outcome(INTERRUPTED, summary={"status": "interrupted"})
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
            say(f"largebatch: a disk failed: {error}.")
        else:
            traceback.print_exc()
    return Outcome(FAULT, summary={"status": "failed"})


def exit_status(statuses: Iterable[int]) -> int:
    """Return the exit status of a sweep: interrupted if an arm was, a fault if one failed; diverging is a result."""
    found = {*statuses}
    if stopped := found & {INTERRUPTED, ENDED}:
        return max(stopped)
    return 0 if found <= {0, DIVERGED} else FAULT
