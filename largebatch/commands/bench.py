"""``largebatch bench``: how fast this machine is at a run's parts."""

from __future__ import annotations

import json

from largebatch.bench.config import BenchConfig
from largebatch.commands.outcome import Call, Outcome
from largebatch.config import Config, build, one_of


def bench(call: Call) -> Outcome:
    """Print how fast this machine is at a run's parts, beside plain PyTorch."""
    shape, asked = call.values.pop("format"), call.values.pop("bench")
    one_of("format", shape, ("text", "json"))
    asked = build(BenchConfig, asked, "bench.")
    config = Config.from_mapping(call.values)
    from largebatch.bench.report import as_text, bench

    facts = bench(config, asked)
    print(json.dumps(facts, indent=2) if shape == "json" else as_text(facts))
    return Outcome(0)
