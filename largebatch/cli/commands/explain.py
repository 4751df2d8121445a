"""``largebatch explain``: what train would do."""

from __future__ import annotations

import json

from largebatch.base.errors import UserError, one_of
from largebatch.base.outcome import Outcome
from largebatch.cli.command import Values, take_format
from largebatch.config.run import Config
from largebatch.runtime.placement import place


def explain(values: Values) -> Outcome:
    """Print what train would do."""
    shape, rates = take_format(values), values.pop("rates")
    one_of("rates", rates, ("table", "full"))
    if rates == "full" and shape == "text":
        raise UserError("rates=full lists every iteration, which is for programs: add format=json.")
    config = Config.from_mapping(values)
    from largebatch.runtime.world import hardware
    from largebatch.verify.explain import as_text, explain

    facts = explain(config, place(config, hardware(config.device)), full=rates == "full")
    print(json.dumps(facts, indent=None if rates == "full" else 2) if shape == "json" else as_text(facts))
    return Outcome(0)
