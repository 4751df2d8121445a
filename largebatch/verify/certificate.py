"""The certificate: one finding for each placement of the trainer, as plain values and as a page for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from largebatch.config.pitfalls import PITFALLS
from largebatch.verify.scope import Plan


@dataclass
class Finding:
    """One placement of the trainer against the definition; differences are relative, the largest over all.

    ``first`` names the first thing that differs by more than the tolerance, ``digest`` the bits of all weights,
    buffers and gradients.
    """

    processes: int
    workers_per_pass: int
    samples: bool = True
    crops: bool = True
    rates: bool = True
    gradients: float = 0.0
    weights: float = 0.0
    buffers: float = 0.0
    validation: bool | None = None
    first: str | None = None
    digest: str = ""

    def differs(self, what: str) -> None:
        """Keep the first difference."""
        self.first = self.first or what

    @property
    def holds(self) -> bool:
        """Whether nothing differs."""
        return self.first is None


@dataclass(frozen=True)
class Certificate:
    """The findings, and whether all of them hold."""

    plan: Plan
    precision: str
    device: str
    findings: list[Finding]
    exact: bool | None
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether the trainer does what the definition says, wherever its workers were."""
        return all(finding.holds for finding in self.findings) and self.exact is not False

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values with stable keys."""
        config = self.plan.config
        return {
            "schema": 1,
            "holds": self.holds,
            "first_difference": next((f.first for f in self.findings if f.first), None),
            "k": config.k,
            "n": config.n,
            "dataset": config.dataset.name,
            "model": config.model.name,
            "pitfall": config.pitfall.name,
            "iterations": self.plan.iterations,
            "precision": self.precision,
            "device": self.device,
            "tolerance": self.plan.tolerance,
            "runs_free": self.plan.free,
            "changes": list(self.plan.changes),
            "notes": self.notes,
            "findings": [asdict(finding) for finding in self.findings],
            "exact": self.exact,
            "seconds": self.seconds,
        }


def as_text(certificate: Certificate) -> str:
    """Return the certificate as a page for people."""
    plan, config = certificate.plan, certificate.plan.config
    lines = [
        f"certify: k = {config.k} workers of n = {config.n}, {config.model.name} on {config.dataset.name}, "
        f"{certificate.precision} on {certificate.device}, {plan.iterations} iterations",
        *(f"changed: {change}" for change in plan.changes),
        *(f"note: {note}" for note in certificate.notes),
    ]
    if config.pitfall.name != "none":
        lines.append(f"PITFALL {config.pitfall.name}: {PITFALLS[config.pitfall.name]}")
    how = "running free" if plan.free else "each iteration from the definition's weights"
    lines += [f"tolerance: {plan.tolerance:g} ({how})", ""]
    head = ("P", "a pass", "samples", "crops", "rates", "gradients", "weights", "BN buffers", "validation", "verdict")
    rows = [head]
    for f in certificate.findings:
        shown = "–" if f.validation is None else _word(f.validation)
        numbers = (f"{f.gradients:.1e}", f"{f.weights:.1e}", f"{f.buffers:.1e}")
        flags = (_word(f.samples), _word(f.crops), _word(f.rates))
        verdict = "holds" if f.holds else "FAILS"
        rows.append((str(f.processes), str(f.workers_per_pass), *flags, *numbers, shown, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if certificate.exact is not None:
        lines.append(f"exact: {'the same bits' if certificate.exact else 'DIFFERENT bits'} for every P")
    lines.append("")
    first = next((f for f in certificate.findings if f.first), None)
    if first is None and certificate.holds:
        lines.append("The trainer makes the definition's steps, wherever its workers are.")
    elif first is not None:
        where = f"P = {first.processes}, {first.workers_per_pass} a pass"
        lines.append(f"First difference ({where}): {first.first}.")
    return "\n".join(lines)


def _word(equal: bool) -> str:
    return "equal" if equal else "DIFFER"
