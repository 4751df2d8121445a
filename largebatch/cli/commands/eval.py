"""``largebatch eval``: evaluate runs, ensembles and files of weights, also in less memory than they take."""

from __future__ import annotations

import dataclasses
import json
import os

from largebatch.base.errors import UserError, one_of
from largebatch.base.outcome import Outcome, say
from largebatch.cli.arguments import keys_of
from largebatch.cli.command import Values
from largebatch.config.build import build
from largebatch.inference.config import EvalConfig
from largebatch.records.write import finite

OURS = [field.name for field in dataclasses.fields(EvalConfig)]


def evaluate(values: Values) -> Outcome:
    """Evaluate what was asked for, print it, and add it to the records of the runs."""
    shape, words = values.pop("format"), values.pop("given")
    one_of("format", shape, ("text", "json"))
    asked = build(EvalConfig, {name: values.pop(name) for name in OURS})
    if "RANK" in os.environ:
        raise UserError("eval is one process on one device: run it without torchrun.")
    given = [key for key in keys_of(words) if key not in (*OURS, "format") and not key.startswith("hydra.")]
    from largebatch.inference import summary
    from largebatch.inference.plan import plan, plan_as_text
    from largebatch.inference.session import open_session

    session = open_session(asked, values, given)
    facts = plan(session) if asked.plan else summary.evaluate(session)
    as_text = plan_as_text if asked.plan else summary.as_text
    print(json.dumps(finite(facts), indent=2) if shape == "json" else as_text(facts))
    if not asked.plan:
        for problem in summary.keep(session, facts):
            say(problem)
    return Outcome(0)
