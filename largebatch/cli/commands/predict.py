"""``largebatch predict``: what k workers take on p GPUs over m nodes, without the GPUs."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from largebatch.base.errors import UserError
from largebatch.base.numbers import divisors, listed
from largebatch.cli.arguments import Given, Vocabulary, Word
from largebatch.cli.command import PlainCommand

if TYPE_CHECKING:
    from largebatch.cost_model.model import Prediction, Question
    from largebatch.cost_model.profile import Profile

UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
MOST_WORKERS = 65_536

VOCABULARY = Vocabulary(
    "predict",
    "Say what an iteration, an epoch and a run of k workers take on p GPUs over m nodes: what goes to computing, to "
    "the exchange of gradients that is not hidden behind it, to waiting for the slowest GPU and for images. It needs "
    "neither the GPUs nor PyTorch, but a profile: measured where one GPU is, by `largebatch bench profile`, or one "
    "that comes along.",
    (
        Word("k", None, "Workers: 256 or 8,64,256. By default 256; with deadline= every power of two.", many=True),
        Word("n", None, "Samples of a worker: must be the profile's."),
        Word(
            "gpus",
            None,
            "How many share the workers, such as 8,256; each must divide a k. By default k of them; with deadline= "
            "every number that divides k.",
            many=True,
        ),
        Word("nodes", None, "How many nodes they are spread over. By default as few as hold them."),
        Word("profile", "paper", "One that comes along, or a file of `bench profile format=json`.", path=True),
        Word(
            "run",
            None,
            "A run of the same network that `largebatch probe` measured: prints whether accuracy is kept.",
            path=True,
        ),
        Word("model", None, "The network that you mean: a profile of another one is refused."),
        Word("device", None, "The device that you mean, such as H200: a profile of another one is refused."),
        Word("epochs", "90", "Of training, each with a validation."),
        Word("deadline", None, "Longest time of the run, such as 1h, 90min or 2d: the fewest GPUs that meet it."),
        Word("network", None, "Gbit/s that a node sends and receives, in the place of the profile's."),
        Word("latency", None, "µs of a message between nodes, in the place of the profile's."),
        Word("gpu_link", None, "Gbit/s that a GPU sends to others of its node, in the place of the profile's."),
        Word("gpu_latency", None, "µs of a message between them, in the place of the profile's."),
        Word("algorithm", "fastest", "How nodes add their gradients.", ("ring", "halving_doubling", "fastest")),
        Word(
            "stragglers",
            "normal",
            "How late the slowest of p GPUs is: as of normal numbers with the profile's mean and spread, as of the "
            "steps measured (which knows none slower than the slowest of them), or none.",
            ("normal", "measured", "none"),
        ),
        Word("format", "text", "How the answer is written.", ("text", "json")),
    ),
    (
        ("predict k=8,64,256,352 gpus=8,64,256,352", "the paper's machine: 12 % more time an iteration on 352 GPUs"),
        ("predict deadline=1h", "the smallest k that ends in an hour there, and on how many GPUs"),
        (
            "predict profile=my.json k=256 gpus=8,16,32 network=200 latency=5",
            "a network of 200 Gbit/s, from a profile of one node",
        ),
        (
            "bench profile model=resnet50 dataset=imagenet dataset.root=… format=json > my.json",
            "fifty steps here, to predict from",
        ),
    ),
    (
        "An exchange of b bytes over p members takes 2(p − 1)(α + b/p·β) in a ring and 2⌈log₂ p⌉α + 2b(p − 1)/p·β by "
        "halving and doubling, α the latency and 1/β the speed of a link; first within the nodes, then between them. "
        "The gradients travel in the profile's number of messages, each as soon as back-propagation has reached it.",
        "Efficiency is the share of an iteration in which a GPU computes: images/s over p times those of one GPU with "
        "the same work. Starting, checkpoints and a congested network are not counted.",
    ),
)


def run(arguments: list[str]) -> int:
    """Print what is predicted, and return the exit status."""
    given = VOCABULARY.read(arguments)
    if given is not None:
        values, text = predicted(given)
        print(json.dumps(values, indent=2, ensure_ascii=False) if given.text("format") == "json" else text)
    return 0


def predicted(given: Given) -> tuple[dict[str, Any], str]:
    """Return what is predicted, as plain values and as text."""
    from largebatch.cost_model.model import Question, predict
    from largebatch.cost_model.text import facts, heading, table

    name = str(given.text("profile"))
    profile = _profile(given, name)
    question = Question(given.whole("epochs", least=1), str(given.text("algorithm")), str(given.text("stragglers")))
    gpus = _numbers(given, "gpus")
    nodes = given.whole("nodes", least=1) if given.text("nodes") else None
    answer: list[str] = []
    if given.text("deadline"):
        predictions, answer = _in_time(given, profile, question, gpus, nodes)
    else:
        pairs = _pairs(_numbers(given, "k") or [256], gpus)
        predictions = [predict(profile, question, k, p, nodes) for k, p in pairs]
    if given.text("run"):
        answer += _borne(str(given.text("run")), profile, name, sorted({one.k for one in predictions}))
    else:
        answer.append(
            "This says nothing about accuracy: give run=… of a run that `largebatch probe` measured for that."
        )
    lines = [*heading(profile), "iteration and its parts in ms", "", *table(predictions), "", *answer]
    return {**facts(name, profile, predictions), "answer": answer}, "\n".join(lines)


def _profile(given: Given, name: str) -> Profile:
    """Return the profile, with the links that were given in the place of its own."""
    from largebatch.cost_model.profile import Link, check_is_of, load

    profile = load(name)
    n = given.whole("n", least=1) if given.text("n") else None
    check_is_of(profile, name, given.text("model"), given.text("device"), n)
    for between, speed, latency in (("nodes", "network", "latency"), ("gpus", "gpu_link", "gpu_latency")):
        own = profile.link(between)
        if not (given.text(speed) or given.text(latency)):
            continue
        if own is None and not (given.text(speed) and given.text(latency)):
            raise UserError(f"the profile does not describe that link: give both {speed}= and {latency}=.")
        profile = profile.with_link(
            Link(
                between,
                given.number(latency, above=0) if given.text(latency) else own.latency_us if own else 0.0,
                given.number(speed, above=0) if given.text(speed) else own.gbit_per_second if own else 0.0,
            )
        )
    return profile


def _numbers(given: Given, key: str) -> list[int]:
    """Return the whole numbers of a list such as 8,256: none where it was not given."""
    parts = given.all(key)
    if not all(part.isdecimal() and 1 <= int(part) <= MOST_WORKERS for part in parts):
        raise UserError(
            f"{key}={','.join(parts)} is not a list of whole numbers from 1 to {MOST_WORKERS}, such as {key}=8,256."
        )
    return sorted({int(part) for part in parts})


def _pairs(ks: list[int], gpus: list[int]) -> list[tuple[int, int]]:
    """Return every k with every number of GPUs that divides it; each must have one.

    Raises:
        UserError: a number of GPUs divides no k, or a k is divided by none.
    """
    if not gpus:
        return [(k, k) for k in ks]
    pairs = [(k, p) for k in ks for p in gpus if k % p == 0]
    for p in gpus:
        if p not in {used for _, used in pairs}:
            raise UserError(
                f"gpus={p} divides no k of {listed(ks)}: a GPU has whole workers. These divide {ks[-1]}: "
                f"{listed(divisors(ks[-1]))}."
            )
    for k in ks:
        if k not in {used for used, _ in pairs}:
            raise UserError(f"k={k} is divided by no gpus of {listed(gpus)}. These divide it: {listed(divisors(k))}.")
    return pairs


def _seconds(text: str) -> float:
    """Return a time such as 1h, 90min or 1.5d in s."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", text)
    if found is None or float(found[1]) == 0:
        raise UserError(f"deadline={text} is no time: give a number above 0 with s, min, h or d, such as 1h or 90min.")
    return float(found[1]) * UNITS[found[2]]


def _in_time(
    given: Given, profile: Profile, question: Question, gpus: list[int], nodes: int | None
) -> tuple[list[Prediction], list[str]]:
    """Return for every k the fewest GPUs that meet the deadline, and the answer in sentences.

    Raises:
        UserError: none does; the shortest time that any takes is named.
    """
    from largebatch.cost_model.model import fewest
    from largebatch.cost_model.text import duration

    deadline = _seconds(str(given.text("deadline")))
    most = min(MOST_WORKERS, profile.train_images // profile.n)
    ks = _numbers(given, "k") or [2**power for power in range(most.bit_length())]
    choices = {k: [p for p in gpus or divisors(k) if k % p == 0 and p % (nodes or 1) == 0] for k in ks}
    found = [fewest(profile, question, k, deadline, choices[k], nodes) for k in ks if choices[k]]
    if not found:
        raise UserError(
            f"No k of {listed(ks)} is shared evenly by gpus={given.text('gpus')} on nodes={nodes or 'any'}."
        )
    met = [one for one in found if one.run <= deadline]
    if not met:
        floor = min(found, key=lambda one: one.run)
        raise UserError(
            f"deadline={given.text('deadline')} is met by no number of GPUs: the shortest run takes "
            f"{duration(floor.run)}, k={floor.k} on {floor.gpus} GPUs. Give more time, fewer epochs, or more GPUs or a "
            "larger k where they were given."
        )
    least = met[0]
    answer = [
        f"{given.text('deadline')} takes k={least.k} or more (kn = {least.k * least.n}): on {least.gpus} GPUs "
        f"{duration(least.run)}, {least.gpu_hours:,.4g} GPU-hours.",
    ]
    return met, answer


def _borne(run: str, profile: Profile, name: str, ks: list[int]) -> list[str]:
    """Return what the answer of a probed run says of each k.

    Raises:
        UserError: the run was not probed enough, or is of another network or n than the profile.
    """
    from pathlib import Path

    from largebatch.cost_model.profile import check_is_of
    from largebatch.reports.answer import answer, open_probed

    probed = open_probed(Path(run))
    check_is_of(profile, name, model=probed.settings["model.name"], n=probed.settings["n"])
    said = answer(probed)
    doubt = f" (up to k={said.unsafe:.0f})" if math.isfinite(said.unsafe) else ""
    kinds = {
        f"should match the baseline (up to k={said.safe})": [k for k in ks if k <= said.safe],
        f"in doubt{doubt}": [k for k in ks if said.safe < k <= said.unsafe],
        "should not match it": [k for k in ks if k > said.unsafe],
    }
    parts = [f"k={listed(found)} {words}" for words, found in kinds.items() if found]
    return [f"Accuracy, by the probe of {run}: {'; '.join(parts)}."]


PREDICT = PlainCommand("predict time, GPUs and GPU-hours of a run on other machines", run)
