"""Compare the trainer with the paper's definition, on any number of processes."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from largebatch.base.numbers import relative_difference
from largebatch.config.pitfalls import PitfallConfig
from largebatch.data.source import Batch, Source
from largebatch.models import is_stochastic
from largebatch.models.build import draws_numbers
from largebatch.records.write import write_json
from largebatch.runtime.placement import Placement
from largebatch.runtime.processes import launch
from largebatch.runtime.world import World, leave
from largebatch.training.learner import DTYPES, Learner, autocast, make_learner, open_data, start
from largebatch.training.optimizer import set_rate
from largebatch.training.pitfalls import sample_stream
from largebatch.training.step import train_step
from largebatch.training.validation import Validator
from largebatch.verify.certificate import Certificate, Finding
from largebatch.verify.paper_step import Definition, State
from largebatch.verify.scope import Plan

VALIDATED = 2000  # images: a larger validation set is not counted again for every placement


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
    config = replace(plan.config, pitfall=PitfallConfig("none"))  # the mistake is the trainer's alone
    world = start(config, placement)
    source = open_data(config, placement, world)

    def forward(model: nn.Module, images: Tensor) -> Tensor:
        with autocast(placement):
            return model(images)  # type: ignore[no-any-return]

    definition = Definition(config, source, world.device, DTYPES[placement.precision], forward, config.exact)
    notes = []
    if _still(definition.model):
        notes.append("dropout and stochastic depth are switched off: their randomness is not the samples'")
    definition.stochastic = config.model.source == "python" and draws_numbers(definition.model, source.sample)
    if definition.stochastic:
        notes.append("the model draws random numbers of its own: they are the same for a worker wherever it is")
    if not any(name.endswith("running_var") for name, _ in definition.model.named_buffers()):
        notes.append("the model has no BatchNorm: every sample is normalised by itself")
    if not config.dataset.reproducible:
        notes.append(
            "dataset.reproducible=false: an item may differ each time that it is read, so that nothing of what is "
            "computed from it can be certified"
        )
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
    learner = make_learner(config, placement, world, source.classes, source.sample)
    _still(learner.model)
    learner.stochastic = config.model.source == "python" and draws_numbers(learner.model, source.sample)
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
        set_rate(learner.optimizer, rate)
        train_step(learner, observer, iteration)
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
    validator, wrong = Validator(learner, source), expected[0]
    if plan.free:
        counted = validator.validate()
        wrong = round(counted.error * counted.total / 100)
    total = sum(map(len, validator.cuts))
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
