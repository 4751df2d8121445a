"""``largebatch eval``: evaluate runs, ensembles and files of weights, also in less memory than they take."""

from __future__ import annotations

import json

from largebatch.base.outcome import Outcome, say
from largebatch.cli.command import Values, take_format, take_own
from largebatch.inference.config import EvalConfig
from largebatch.records.write import finite


def evaluate(values: Values) -> Outcome:
    """Evaluate what was asked for, print it, and add it to the records of the runs."""
    shape = take_format(values)
    asked, given = take_own("eval", EvalConfig, values)
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
