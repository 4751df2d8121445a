"""``largebatch certify``: prove that k workers are k workers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from largebatch.commands.outcome import FAULT, Call, Outcome, say
from largebatch.config import CertifyConfig, Config, UserError, build, one_of
from largebatch.placement import place
from largebatch.record import default_directory, finite, safe_name


def certify(call: Call) -> Outcome:
    """Hold the trainer against the paper's definition, wherever it can run."""
    shape, asked = call.values.pop("format"), call.values.pop("certify")
    one_of("format", shape, ("text", "json"))
    asked = build(CertifyConfig, asked, "certify.")
    config = Config.from_mapping(call.values)
    if "RANK" in os.environ:
        raise UserError("certify starts its own processes, of every number that divides k: run it without torchrun.")
    from largebatch import certify
    from largebatch.world import hardware

    machine = hardware()
    placement = place(config, machine)
    plan, places = certify.prepare(config, placement, asked, machine)
    parent = Path("runs") / f"certify-{safe_name(config.dataset.name)}-{safe_name(config.model.name)}"
    directory = Path(config.run_dir or default_directory(plan.config, placement.precision, parent))
    certificate = certify.certify(plan, places, directory, shown=sys.stderr.isatty())
    facts = certificate.to_mapping()
    print(json.dumps(finite(facts), indent=2) if shape == "json" else certify.as_text(certificate))
    say(f"certificate in {directory / 'certificate.json'}")
    return Outcome(0 if certificate.holds else FAULT, str(directory))
