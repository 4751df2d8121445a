"""``largebatch eval``: evaluate runs, ensembles and files of weights, also in less memory than they take."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence

from largebatch.commands.outcome import Call, Outcome, say
from largebatch.config import UserError, build, one_of
from largebatch.evaluation.config import EvalConfig
from largebatch.record import finite

PATHS = ("run", "state_file", "weights", "out")
OURS = [field.name for field in dataclasses.fields(EvalConfig)]


def quoted(arguments: Sequence[str]) -> list[str]:
    """Put paths into quotes, which may hold what Hydra gives a meaning to, and make one list of every ``runs=``."""
    runs, others = [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or value[:1] in ("", "'", '"', "[") or value == "null":
            others.append(argument)
        elif key == "runs":
            runs += value.split(",")
        else:
            others.append(f"{key}={_quote(value)}" if key in PATHS else argument)
    return [*others, f"runs=[{','.join(map(_quote, runs))}]"] if runs else others


def _quote(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def evaluate(call: Call) -> Outcome:
    """Evaluate what was asked for, print it, and add it to the records of the runs."""
    shape, words = call.values.pop("format"), call.values.pop("given")
    one_of("format", shape, ("text", "json"))
    asked = build(EvalConfig, {name: call.values.pop(name) for name in OURS})
    if "RANK" in os.environ:
        raise UserError("eval is one process on one device: run it without torchrun.")
    keys = dict.fromkeys(word.partition("=")[0].lstrip("+~") for word in words)
    given = [key for key in keys if key not in (*OURS, "format") and not key.startswith("hydra.")]
    from largebatch.evaluation import report
    from largebatch.evaluation.plan import plan, plan_as_text
    from largebatch.evaluation.session import open_session

    session = open_session(asked, call.values, given)
    facts = plan(session) if asked.plan else report.evaluate(session)
    as_text = plan_as_text if asked.plan else report.as_text
    print(json.dumps(finite(facts), indent=2) if shape == "json" else as_text(facts))
    if not asked.plan:
        for problem in report.keep(session, facts):
            say(problem)
    return Outcome(0)
