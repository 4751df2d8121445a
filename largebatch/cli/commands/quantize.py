"""``largebatch quantize``: a trained network in integers, and what that costs."""

from __future__ import annotations

import json

from largebatch.base.outcome import Outcome, say
from largebatch.cli.command import Values, take_format, take_own
from largebatch.quantization.config import QuantizeConfig
from largebatch.records.write import finite


def quantize(values: Values) -> Outcome:
    """Make a network of integers, write it, and say what it costs."""
    shape = take_format(values)
    asked, given = take_own("quantize", QuantizeConfig, values)
    from largebatch.inference.quantize import quantize_session
    from largebatch.quantization.degradation import as_text

    facts = quantize_session(asked, values, given)
    print(json.dumps(finite(facts), indent=2, ensure_ascii=False) if shape == "json" else as_text(facts))
    for note in facts["notes"]:
        say(note)
    return Outcome(0)
