"""``largebatch explain``: what train would do."""

from __future__ import annotations

import json

from largebatch.commands.outcome import Call, Outcome
from largebatch.config import Config, UserError, one_of
from largebatch.placement import place


def explain(call: Call) -> Outcome:
    """Print what train would do."""
    shape, rates = call.values.pop("format"), call.values.pop("rates")
    one_of("format", shape, ("text", "json"))
    one_of("rates", rates, ("table", "full"))
    if rates == "full" and shape == "text":
        raise UserError("rates=full lists every iteration, which is for programs: add format=json.")
    config = Config.from_mapping(call.values)
    from largebatch.explain import as_text, explain
    from largebatch.world import hardware

    facts = explain(config, place(config, hardware()), full=rates == "full")
    print(json.dumps(facts, indent=None if rates == "full" else 2) if shape == "json" else as_text(facts))
    return Outcome(0)
