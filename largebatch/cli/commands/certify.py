"""``largebatch certify``: prove that k workers are k workers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from largebatch.base.errors import UserError
from largebatch.base.outcome import FAULT, Outcome, say
from largebatch.cli.command import Values, take_format
from largebatch.config.build import build
from largebatch.config.groups import CertifyConfig
from largebatch.config.run import Config
from largebatch.records.read import default_directory, safe_name
from largebatch.records.write import finite
from largebatch.runtime.placement import place

if TYPE_CHECKING:
    from largebatch.verify.certificate import Certificate


def certify(values: Values) -> Outcome:
    """Hold the trainer against the paper's definition, wherever it can run."""
    shape = take_format(values)
    certificate, directory = certified(values)
    from largebatch.verify.certificate import as_text

    facts = certificate.to_mapping()
    print(json.dumps(finite(facts), indent=2) if shape == "json" else as_text(certificate))
    say(f"certificate in {directory / 'certificate.json'}")
    return Outcome(0 if certificate.holds else FAULT, str(directory))


def certified(values: Values) -> tuple[Certificate, Path]:
    """Return the certificate of the composed values, and the directory in which it is written."""
    asked = build(CertifyConfig, values.pop("certify"), "certify.")
    config = Config.from_mapping(values)
    if "RANK" in os.environ:
        raise UserError("certify starts its own processes, of every number that divides k: run it without torchrun.")
    from largebatch.runtime.world import hardware
    from largebatch.verify.certify import certify
    from largebatch.verify.scope import prepare

    machine = hardware(config.device)
    placement = place(config, machine)
    plan, places = prepare(config, placement, asked, machine)
    parent = Path("runs") / f"certify-{safe_name(config.dataset.name)}-{safe_name(config.model.name)}"
    run_hash = plan.config.run_hash(placement.precision)
    directory = Path(config.run_dir or default_directory(plan.config, run_hash, parent))
    return certify(plan, places, directory, shown=sys.stderr.isatty()), directory
