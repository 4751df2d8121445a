"""``largebatch quantize``: a trained network in integers, and what that costs."""

from __future__ import annotations

import dataclasses
import json
import os

from largebatch.base.errors import UserError, one_of
from largebatch.base.outcome import Outcome, say
from largebatch.cli.arguments import keys_of
from largebatch.cli.command import Values
from largebatch.config.build import build
from largebatch.quantization.config import QuantizeConfig
from largebatch.records.write import finite

OURS = [field.name for field in dataclasses.fields(QuantizeConfig)]


def quantize(values: Values) -> Outcome:
    """Make a network of integers, write it, and say what it costs."""
    shape, words = values.pop("format"), values.pop("given")
    one_of("format", shape, ("text", "json"))
    asked = build(QuantizeConfig, {name: values.pop(name) for name in OURS})
    if "RANK" in os.environ:
        raise UserError("quantize is one process: run it without torchrun.")
    given = [key for key in keys_of(words) if key not in (*OURS, "format") and not key.startswith("hydra.")]
    from largebatch.inference.quantize import quantize_session
    from largebatch.quantization.degradation import as_text

    facts = quantize_session(asked, values, given)
    print(json.dumps(finite(facts), indent=2, ensure_ascii=False) if shape == "json" else as_text(facts))
    for note in facts["notes"]:
        say(note)
    return Outcome(0)
