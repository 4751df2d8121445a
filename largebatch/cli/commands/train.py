"""``largebatch train``: one run, from its configuration to its record."""

from __future__ import annotations

from largebatch.base.outcome import Outcome, say
from largebatch.base.signals import ENDED, Ended, ended_by_signals
from largebatch.cli.command import Values
from largebatch.config.run import Config
from largebatch.launch.run import train_run


def train(values: Values) -> Outcome:
    """Train one run."""
    config = Config.from_mapping(values)
    with ended_by_signals():
        try:
            return train_run(config)
        except Ended:
            say("largebatch: ended by a signal outside of training; resume=true continues.")
            return Outcome(ENDED)
