"""Prove that k workers are k workers: the trainer against the definition, on any number of processes."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from largebatch.base.errors import UserError
from largebatch.base.numbers import divisors, relative_difference
from largebatch.config.groups import CertifyConfig, DatasetConfig
from largebatch.config.pitfalls import PITFALLS, PitfallConfig
from largebatch.config.run import Config
from largebatch.data import sets
from largebatch.data.layouts import open_splits
from largebatch.data.source import Batch, Source
from largebatch.models import build_model, is_stochastic
from largebatch.records.write import write_json
from largebatch.runtime.placement import Hardware, Placement, processes_for
from largebatch.runtime.processes import launch
from largebatch.runtime.world import World, leave
from largebatch.training.learner import DTYPES, Learner, autocast, make_learner, open_data, start
from largebatch.training.loop import sample_stream, train_step, validation_cuts
from largebatch.training.validation import evaluate, shard
from largebatch.verify.paper_step import Definition, State

# float64 runs free: rounding stays below this over the iterations. float32 and bf16 drift apart by themselves, so
# there every iteration starts from the definition's weights, and one step's difference is bounded.
TOLERANCES = {"fp64": 1e-10, "fp32": 2e-3, "tf32": 2e-2, "bf16": 5e-2}
VALIDATED = 2000  # images: a larger validation set is not counted again for every placement


@dataclass(frozen=True)
class Plan:
    """What is certified: the compressed configuration, where, and what was changed to make it fit."""

    config: Config
    iterations: int
    tolerance: float
    free: bool
    changes: tuple[str, ...]


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


def make_plan(config: Config, placement: Placement, asked: CertifyConfig) -> Plan:
    """Compress an experiment so that warmup and a decay take place within a few iterations.

    Args:
        config: The experiment.
        placement: Where it would run; decides the precision, and so the tolerance.
        asked: How many steps are compared, and how closely.

    Raises:
        UserError: an optimizer without a definition by hand.
    """
    if config.optimizer.name != "sgd":
        raise UserError(
            f"optimizer={config.optimizer.name} has no definition in the paper to be held against: certify takes "
            "optimizer=sgd."
        )
    iterations, changes = asked.iterations, []
    dataset = config.dataset
    if sets.locate(dataset).startswith("not found"):
        dataset = _synthetic(dataset)
        changes.append(
            f"dataset={config.dataset.name} was not found: synthetic images of {dataset.channels}×{dataset.height}×"
            f"{dataset.width} instead"
        )
    train_images = dataset.train_images or len(open_splits(dataset).train)
    config.check_size(train_images)
    per_epoch = train_images // config.minibatch
    warmup, decay = iterations // 2, iterations - max(1, iterations // 3)
    epochs = iterations // per_epoch + 1
    changed = replace(
        config,
        dataset=dataset,
        epochs=epochs,
        iterations=None,
        lr=replace(config.lr, base_minibatch=config.n),
        warmup=replace(config.warmup, epochs=warmup / per_epoch),
        schedule=replace(config.schedule, milestones=(decay / per_epoch,)),
    )
    changes.append(f"lr.base_minibatch={config.n}, so that the rates of k={config.k} workers are scaled by k")
    changes.append(f"schedule compressed: warmup over {warmup} iterations, decay at iteration {decay + 1}")
    # With a tree over powers of two everything is added in one order: nothing may differ by a bit.
    bits = config.exact and config.n & (config.n - 1) == 0
    default = 0.0 if bits and config.bn.running == "worker0" else TOLERANCES[placement.precision]
    free = bits or placement.precision == "fp64"
    tolerance = default if asked.tolerance is None else asked.tolerance
    return Plan(changed, iterations, tolerance, free, tuple(changes))


def prepare(
    config: Config, placement: Placement, asked: CertifyConfig, machine: Hardware
) -> tuple[Plan, list[Placement]]:
    """Decide what is certified and where, within the time that is allowed.

    Args:
        config: The experiment.
        placement: Where it would run.
        asked: Steps, processes, tolerance and minutes.
        machine: What processes can be started on.

    Raises:
        UserError: see :func:`make_plan` and :func:`processes_for`.
    """
    plan = make_plan(config, placement, asked)
    processes = processes_for(asked, config.k, machine, placement.device)
    places = placements(placement, plan.config, processes, machine.cores)
    smaller, change = fit_to_time(plan.config, placement, asked, len(places))
    if not change:
        return plan, places
    plan = make_plan(replace(config, k=smaller.k, processes=None, workers_per_pass=None), placement, asked)
    fitting = [number for number in processes if smaller.k % number == 0]
    return (
        replace(plan, changes=(change, *plan.changes)),
        placements(placement, plan.config, fitting, machine.cores),
    )


def fit_to_time(config: Config, placement: Placement, asked: CertifyConfig, topologies: int) -> tuple[Config, str]:
    """Reduce k where the definition and the trainer would take too long, and say so.

    Args:
        config: The experiment.
        placement: Device and precision of a pass.
        asked: The minutes allowed.
        topologies: How many placements the trainer is followed on.

    Returns:
        The configuration, with the largest divisor of k that fits (4 or more where k has one), and a sentence, empty
        where nothing was changed.
    """
    passes = asked.iterations * (1 + topologies)
    seconds = _time_of_a_pass(config, placement)
    if seconds * passes * config.k <= asked.minutes * 60:
        return config, ""
    fitting = [d for d in divisors(config.k) if seconds * passes * d <= asked.minutes * 60]
    k = max([*fitting, *(d for d in divisors(config.k) if d <= 4)])
    if k == config.k:
        return config, f"this takes about {seconds * passes * k / 60:.0f} minutes here"
    return replace(config, k=k, processes=None, workers_per_pass=None), (
        f"k={config.k} would take about {seconds * passes * config.k / 3600:.1f} hours here: k={k} instead, with the "
        f"same n={config.n}; certify.minutes={asked.minutes:g} is the limit"
    )


def _time_of_a_pass(config: Config, placement: Placement) -> float:
    """Return the seconds of one worker's forward and backward pass, the second of two."""
    device, dtype = torch.device(placement.device), DTYPES[placement.precision]
    shape = config.dataset
    model = build_model(config.model, shape.classes or 1000, shape.channels).to(device, dtype).train()
    seconds = 0.0
    for _ in range(2):
        images = torch.randn(config.n, shape.channels, shape.height, shape.width, device=device, dtype=dtype)
        started = time.perf_counter()
        with autocast(placement):
            total = model(images).sum()
        total.backward()
        total.item()  # waits for a GPU
        seconds = time.perf_counter() - started
    return seconds


def _synthetic(dataset: DatasetConfig) -> DatasetConfig:
    return replace(
        dataset,
        name="synthetic",
        root=None,
        decoder="none",
        crop="pad",
        pad=min(4, dataset.height // 8),
        flip=True,
        resize=None,
        train_images=dataset.train_images or 50_000,
        val_images=500,
        classes=dataset.classes or 1000,
    )


def placements(placement: Placement, config: Config, allowed: Iterable[int], cores: int) -> list[Placement]:
    """Return every placement to certify: each P that divides k, each workers_per_pass that divides k/P."""
    result = []
    for processes in allowed:
        workers = config.k // processes
        whole_pass = config.pitfall.name == "sync_bn"
        for per_pass in divisors(workers):
            if (config.exact and per_pass > 1) or (whole_pass and (per_pass < config.k or processes > 1)):
                continue
            threads = placement.threads if config.exact or config.threads else max(1, cores // processes)
            where = replace(placement, processes=processes, workers=workers, workers_per_pass=per_pass)
            result.append(replace(where, threads=threads, cores=max(1, cores // processes)))
    return result


def certify(plan: Plan, places: list[Placement], directory: Path, shown: bool = True) -> Certificate:
    """Compute the same steps by the definition and by the trainer wherever it can run, and compare.

    Args:
        plan: From :func:`make_plan`.
        places: From :func:`placements`, those of equal ``processes`` next to each other.
        directory: Where ``certificate.json`` goes, and for a while the definition's tensors.
        shown: Whether a bar shows the progress.
    """
    started = time.monotonic()
    truth = directory / "definition"
    shutil.rmtree(truth, ignore_errors=True)
    truth.mkdir(parents=True)
    try:
        counts = sorted({place.processes for place in places})
        with tqdm(total=1 + len(counts), desc="definition", disable=not shown, leave=False) as bar:
            notes = _define(plan, places[0], truth)
            bar.update()
            findings: list[Finding] = []
            for processes in counts:
                bar.set_description(f"{processes} process{'es' if processes > 1 else ''}")
                group = [place for place in places if place.processes == processes]
                findings += launch(_trace, (plan, group, truth), processes, group[0].threads)
                bar.update()
    finally:
        shutil.rmtree(truth, ignore_errors=True)
    digests = {finding.digest for finding in findings}
    exact = len(digests) == 1 if plan.config.exact else None
    device = places[0].device
    result = Certificate(plan, places[0].precision, device, findings, exact, time.monotonic() - started, notes)
    write_json(directory / "certificate.json", result.to_mapping())
    return result


def _honest(config: Config) -> Config:
    """Return the experiment without its pitfall: the mistake is the trainer's alone."""
    return replace(config, pitfall=PitfallConfig("none"))


def _still(model: nn.Module) -> bool:
    """Switch dropout and stochastic depth off; return whether there was any."""
    found = is_stochastic(model)
    for module in model.modules():
        for name in ("p", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return found


def _define(plan: Plan, placement: Placement, truth: Path) -> list[str]:
    """Write the definition's steps to files; return what is to be said of the model."""
    placement = replace(placement, processes=1)
    config = _honest(plan.config)
    world = start(config, placement)
    source = open_data(config, placement, world)

    def forward(model: nn.Module, images: Tensor) -> Tensor:
        with autocast(placement):
            return model(images)  # type: ignore[no-any-return]

    definition = Definition(config, source, world.device, DTYPES[placement.precision], forward, config.exact)
    notes = []
    if _still(definition.model):
        notes.append("dropout and stochastic depth are switched off: their randomness is not the samples'")
    if not any(name.endswith("running_var") for name, _ in definition.model.named_buffers()):
        notes.append("the model has no BatchNorm: every sample is normalised by itself")
    if source.val_images > VALIDATED:
        notes.append(f"validation is not compared: {source.val_images:,} images are more than {VALIDATED:,}")
    state = definition.start()
    _write(truth / "start", state, {})
    facts = []
    for iteration in range(plan.iterations):
        step = definition.step(iteration, state)
        state = step.after
        _write(truth / str(iteration), state, step.gradients)
        facts.append(
            {
                "rate": step.rate,
                "samples": [_hash(samples) for samples in step.samples],
                "crops": [_hash(images) for images in step.images],
            }
        )
    validation = definition.validate(state) if source.val_images <= VALIDATED else None
    (truth / "facts.json").write_text(json.dumps({"steps": facts, "validation": validation}))
    leave()
    return notes


def _hash(tensor: Tensor) -> int:
    """Return 63 bits of a tensor's SHA-256."""
    digest = hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _write(path: Path, state: State, gradients: dict[str, Tensor]) -> None:
    tensors = {f"weights.{name}": value for name, value in state.weights.items()}
    tensors |= {f"buffers.{name}": value for name, value in state.buffers.items()}
    tensors |= {f"gradients.{name}": value for name, value in gradients.items()}
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path)


def _read(path: Path, kind: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{kind}.")]  # noqa: SIM118  (not a dict)
        return {name.removeprefix(f"{kind}."): file.get_tensor(name) for name in names}


def _trace(plan: Plan, group: list[Placement], truth: Path) -> list[Finding]:
    """Let the trainer make the steps, in every process of a group, once for each placement on it."""
    world = start(plan.config, group[0])
    try:
        return [_follow(plan, placement, world, truth) for placement in group]
    finally:
        leave()


def _follow(plan: Plan, placement: Placement, world: World, truth: Path) -> Finding:
    config = plan.config
    source = open_data(config, placement, world)
    learner = make_learner(config, placement, world, source.classes)
    _still(learner.model)
    learner.stochastic = False
    facts = json.loads((truth / "facts.json").read_text())
    finding = Finding(placement.processes, placement.workers_per_pass)
    observer = _Observer(learner, source, plan.iterations)
    rates = config.rates(source.train_images)
    bits = hashlib.sha256()
    _compare(finding, "weights", learner, _read(truth / "start", "weights"), plan, "before the first iteration")
    for iteration in range(plan.iterations):
        if not plan.free:
            before = truth / (str(iteration - 1) if iteration else "start")
            learner.model.load_state_dict({**_read(before, "weights"), **_read(before, "buffers")})
        rate = rates.rate_at(iteration)
        train_step(learner, observer, iteration, rate)
        learner.running.synchronise(world)
        at = f"at iteration {iteration + 1}"
        expected = facts["steps"][iteration]
        for kind, seen in zip(("samples", "crops"), observer.hashes(world), strict=True):
            different = [worker for worker in range(config.k) if seen[worker] != expected[kind][worker]]
            if different:
                setattr(finding, kind, False)
                finding.differs(f"{kind} of worker {different[0]} {at}")
        if rate != expected["rate"]:
            finding.rates = False
            finding.differs(f"rate {at}: {rate:.6g} instead of {expected['rate']:.6g}")
        for kind in ("gradients", "weights", "buffers"):
            _compare(finding, kind, learner, _read(truth / str(iteration), kind), plan, at)
            for value in _tensors(learner, kind).values():
                bits.update(value.detach().cpu().contiguous().numpy().tobytes())
    finding.digest = bits.hexdigest()
    if facts["validation"] is not None:
        _validate(finding, plan, learner, source, facts["validation"])
    return finding


def _tensors(learner: Learner, kind: str) -> dict[str, Tensor]:
    if kind == "buffers":
        return dict(learner.model.named_buffers())
    if kind == "weights":
        return dict(learner.model.named_parameters())
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in learner.model.named_parameters()}


def _compare(finding: Finding, kind: str, learner: Learner, expected: dict[str, Tensor], plan: Plan, at: str) -> None:
    """Compare all tensors of one kind, and keep the largest relative difference."""
    norms = {name: float(value.double().norm()) for name, value in expected.items()}
    norm_of_all = sum(norm**2 for norm in norms.values()) ** 0.5
    largest = getattr(finding, kind)
    for name, value in _tensors(learner, kind).items():
        difference = float((value.detach().cpu().double() - expected[name].double()).norm())
        relative = relative_difference(difference, norms[name], norm_of_all)
        if not relative <= plan.tolerance:
            finding.differs(f"{kind} of {name} {at}, by {relative:.1e}")
        largest = max(largest, relative)
    setattr(finding, kind, largest)


def _validate(finding: Finding, plan: Plan, learner: Learner, source: Source, expected: list[int]) -> None:
    """Count the validation set as the trainer does; the error itself is compared where the run is free."""
    cuts = validation_cuts(plan.config, source.val_images)
    mine = shard(len(cuts), learner.world.rank, learner.world.size)
    if plan.free:
        with autocast(learner.placement):
            batches = source.validation([cuts[number] for number in mine])
            counted = evaluate(learner.model, batches, mine, cuts, learner.world)
        wrong = round(counted.error * counted.total / 100)
    else:
        wrong = expected[0]
    total = sum(map(len, cuts))
    finding.validation = [wrong, total] == expected
    if not finding.validation:
        finding.differs(f"validation: {wrong} wrong of {total} counted, instead of {expected[0]} of {expected[1]}")


class _Observer(Iterator[Batch]):
    """The batches of this process, with a hash of each worker's sample indices and of its images on the way."""

    def __init__(self, learner: Learner, source: Source, iterations: int) -> None:
        config, place = learner.config, learner.placement
        self._k, self._n, self._first = config.k, config.n, learner.first_worker
        stream = sample_stream(config, source.train_images)
        passes = stream.passes(0, iterations, self._first, place.workers, place.workers_per_pass)
        self._indices: list[Tensor] = []
        self._batches = source.train(self._noted(passes))
        self._samples: list[int] = []
        self._crops: list[int] = []

    def _noted(self, passes: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        for epoch, indices in passes:
            self._indices.append(indices)  # a loader may ask ahead: they are hashed when their images come
            yield epoch, indices

    def __next__(self) -> Batch:
        batch = next(self._batches)
        indices = self._indices.pop(0)
        self._samples += [_hash(part) for part in torch.split(indices, self._n)]
        self._crops += [_hash(part) for part in torch.split(batch.images, self._n)]
        return batch

    def hashes(self, world: World) -> tuple[list[int], list[int]]:
        """Return the hashes of all k workers' samples and images in the step just made."""
        rows = torch.zeros((2, self._k), dtype=torch.int64, device=world.device)
        mine = slice(self._first, self._first + len(self._samples))
        rows[:, mine] = torch.tensor([self._samples, self._crops], device=world.device)
        self._samples, self._crops = [], []
        samples, crops = world.sum(rows).tolist()
        return samples, crops


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
