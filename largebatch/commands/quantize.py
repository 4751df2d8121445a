"""``largebatch quantize``: a trained network in integers, and what that costs."""

from __future__ import annotations

import dataclasses
import json
import os

from largebatch.commands.outcome import Call, Outcome, say
from largebatch.compress.config import QuantizeConfig
from largebatch.config import UserError, build, one_of
from largebatch.record import finite

OURS = [field.name for field in dataclasses.fields(QuantizeConfig)]


def quantize(call: Call) -> Outcome:
    """Make a network of integers, write it, and say what it costs."""
    shape, words = call.values.pop("format"), call.values.pop("given")
    one_of("format", shape, ("text", "json"))
    asked = build(QuantizeConfig, {name: call.values.pop(name) for name in OURS})
    if "RANK" in os.environ:
        raise UserError("quantize is one process: run it without torchrun.")
    keys = dict.fromkeys(word.partition("=")[0].lstrip("+~") for word in words)
    given = [key for key in keys if key not in (*OURS, "format") and not key.startswith("hydra.")]
    from largebatch.compress.report import as_text
    from largebatch.quantize import quantize_session

    facts = quantize_session(asked, call.values, given)
    print(json.dumps(finite(facts), indent=2, ensure_ascii=False) if shape == "json" else as_text(facts))
    for note in facts["notes"]:
        say(note)
    return Outcome(0)
