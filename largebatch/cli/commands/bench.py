"""``largebatch bench``: how fast this machine is at a run's parts."""

from __future__ import annotations

import json

from largebatch.base.outcome import Outcome
from largebatch.bench.config import BenchConfig
from largebatch.cli.command import Values, take_format
from largebatch.config.build import build
from largebatch.config.run import Config


def bench(values: Values) -> Outcome:
    """Print how fast this machine is at a run's parts, beside plain PyTorch."""
    shape, asked = take_format(values), values.pop("bench")
    asked = build(BenchConfig, asked, "bench.")
    config = Config.from_mapping(values)
    from largebatch.bench.results import as_text, bench

    facts = bench(config, asked)
    print(json.dumps(facts, indent=2) if shape == "json" else as_text(facts))
    return Outcome(0)
