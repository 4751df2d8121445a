"""exact=true: the same bits on any power of two of processes."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_loop import CPU, RUN, fit_all

from largebatch.base.errors import UserError
from largebatch.base.numbers import PairwiseSum
from largebatch.models import SmallResNet
from largebatch.records.read import read_metrics
from largebatch.runtime.placement import place
from largebatch.runtime.processes import launch
from largebatch.runtime.world import World
from largebatch.training.exchange import Tree, _cut

EXACT = [*RUN, "exact=true", "precision=fp32"]
TIMES = ("seconds", "images_per_second")


@pytest.fixture(scope="module")
def runs(compose, tmp_path_factory) -> dict[str, Path]:
    """Train the same run on 1, 2 and 4 processes, and one that moves from 2 to 4 in the middle."""
    root = tmp_path_factory.mktemp("exact")
    directories = {}
    for processes in (1, 2, 4):
        place_words = [*EXACT, f"processes={processes}"]
        wanted = {
            f"worker0-{processes}": [],
            f"mean-{processes}": ["bn.running=mean", "epochs=2", "schedule.milestones=[1.5]"],
        }
        if processes == 2:
            wanted["moved"] = ["iterations=7"]
        if processes == 4:
            wanted["moved"] = ["resume=true"]
        calls = []
        for name, words in wanted.items():
            config = compose(*place_words, *words)
            directories[name] = root / name
            calls.append((config, place(config, CPU), root / name))
        launch(fit_all, (calls,), processes, threads=1)
    return directories


def bits(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def figures(directory: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(directory)]


@pytest.mark.parametrize("policy", ["worker0", "mean"])
def test_weights_buffers_and_metrics_have_the_same_bits_for_every_number_of_processes(runs, policy):
    first, *others = (runs[f"{policy}-{processes}"] for processes in (1, 2, 4))
    assert figures(first)[-1]["kind"] == "epoch"
    assert figures(first)[-1]["val_error"] < 100
    for other in others:
        assert bits(other) == bits(first)
        assert figures(other) == figures(first)


def test_a_run_that_changes_its_processes_in_the_middle_keeps_its_bits(runs):
    assert bits(runs["moved"]) == bits(runs["worker0-1"])
    assert figures(runs["moved"]) == figures(runs["worker0-1"])


def test_the_weights_moved(runs):
    tensors = load_file(runs["worker0-1"] / "model.safetensors")
    assert tensors["layer1.0.bn2.weight"].norm() > 0.01  # it starts at zero


def test_pairwise_sum_is_one_tree_however_it_is_cut():
    terms = torch.randn(16, 1000, generator=torch.Generator().manual_seed(0)).mul(1e3)

    def tree(values: list[torch.Tensor]) -> torch.Tensor:
        total = PairwiseSum()
        for value in values:
            total.add(value)
        return total.total()

    whole = tree(list(terms))
    for parts in (2, 4, 8):
        assert tree([tree(list(part)) for part in terms.chunk(parts)]).equal(whole)
    assert not terms.sum(0).equal(whole)  # another order has other bits


def test_pairwise_sum_of_any_number_of_terms():
    for count in range(1, 20):
        total = PairwiseSum()
        for value in range(count):
            total.add(value)
        assert total.total() == count * (count - 1) // 2
    with pytest.raises(ValueError, match="no terms"):
        PairwiseSum().total()


@pytest.mark.parametrize("bucket_bytes", [1, 4096, 10**9])
def test_buckets_do_not_change_the_sum(bucket_bytes):
    world = World(0, 1, torch.device("cpu"))
    images = torch.randn(4, 8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    model = SmallResNet(8, 10, channels=1)
    model.unused = torch.nn.Linear(3, 3)  # a layer that no gradient reaches
    tree = Tree(model, world, bucket_bytes)
    sums = {name: PairwiseSum() for name, _ in model.named_parameters()}
    for batch in images:
        model(batch).square().sum().backward()
        for name, parameter in model.named_parameters():
            sums[name].add(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
        model.zero_grad()
    for number, batch in enumerate(images):
        with tree.passing(last=number == 3):
            tree.net(batch).square().sum().backward()
    tree.finish()
    for name, parameter in model.named_parameters():
        assert parameter.grad.equal(sums[name].total()), name


def test_buckets_hold_every_parameter_once():
    model = SmallResNet(8, 10)
    for size in (1, 4096, 10**9):
        cut = [parameter for bucket in _cut(model, size) for parameter in bucket.parameters]
        assert list(map(id, cut)) == list(map(id, reversed(list(model.parameters()))))
    assert [len(_cut(model, size)) for size in (1, 10**9)] == [29, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["workers_per_pass=2"], "exact=true adds up worker by worker"),
        (["deterministic=false"], "deterministic=false"),
        (["k=6"], "k=6 must be a power of two"),
        (["exchange.compress=bf16"], "leave exchange.compress=bf16 out"),
        (["bn.kernel=joint"], "leave bn.kernel=joint out"),
    ],
)
def test_what_does_not_go_with_exact(compose, words, message):
    with pytest.raises(UserError, match=message):
        compose("exact=true", *words)


def test_exact_fixes_threads_and_passes_for_any_number_of_processes(compose):
    places = [place(compose("exact=true", f"processes={processes}"), CPU) for processes in (1, 2, 4)]
    assert {(where.threads, where.workers_per_pass) for where in places} == {(1, 1)}
