import copy
import shutil
from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn

from largebatch.base.errors import UserError
from largebatch.models import SmallResNet
from largebatch.models.batchnorm import RunningStatistics, batchnorms, recomputed

N = 6


def small_network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))
    for norm in batchnorms(net):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    return net.double()


def images(workers: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, workers + 1).repeat_interleave(N).view(-1, 1, 1, 1)  # workers whose statistics differ
    return torch.randn(workers * N, 2, 7, 7, generator=generator, dtype=torch.float64) * scale


def squared(output: torch.Tensor) -> torch.Tensor:
    return (output**2 * torch.linspace(-1, 1, output[0].numel(), dtype=output.dtype).view(output[0].shape)).sum()


@pytest.mark.parametrize("policy", ["worker0", "mean"])
def test_groups_equal_separate_workers(policy):
    net, workers = small_network(), [small_network() for _ in range(4)]
    running = RunningStatistics(net, policy, 0.1, groups=4, first=True)
    x = images(4)
    running.before_pass(0)
    output = net(x)
    squared(output).backward()

    separate = [worker(part) for worker, part in zip(workers, x.split(N), strict=True)]
    for result in separate:
        squared(result).backward()
    torch.testing.assert_close(output, torch.cat(separate), rtol=1e-12, atol=1e-12)
    for mine, *theirs in zip(net.parameters(), *(worker.parameters() for worker in workers), strict=True):
        torch.testing.assert_close(mine.grad, sum(parameter.grad for parameter in theirs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("passes", "groups"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("policy", ["worker0", "mean"])
@pytest.mark.parametrize("compiled", [False, True])
def test_running_statistics_follow_the_policy(policy, passes, groups, compiled):
    net, workers = small_network(), [small_network() for _ in range(4)]
    running = RunningStatistics(net, policy, 0.1, groups, first=True, compiled=compiled)
    counted = set()
    for step in range(3):
        x = images(4, seed=step)
        for number, part in enumerate(x.split(groups * N)):
            running.before_pass(number)
            counted.add(net[1].momenta)
            net(part)
            running.after_pass(number)
        running.after_step()
        for worker, part in zip(workers, x.split(N), strict=True):  # each tracks its own, with PyTorch's BatchNorm
            worker(part)
    for name, buffer in net.named_buffers():
        if name.endswith("num_batches_tracked"):
            continue
        tracked = [dict(worker.named_buffers())[name] for worker in workers]
        expected = tracked[0] if policy == "worker0" else torch.stack(tracked).mean(0)
        torch.testing.assert_close(buffer, expected, rtol=1e-12, atol=1e-14)
    assert len(counted) == 1 or not compiled  # a graph is made for the groups that count in it


@pytest.mark.parametrize("compiled", [False, True])
def test_a_process_without_worker_0_leaves_the_statistics_alone(compiled):
    net = small_network()
    before = copy.deepcopy(net.state_dict())
    running = RunningStatistics(net, "worker0", 0.1, groups=2, first=False, compiled=compiled)
    for number in range(2):
        running.before_pass(number)
        net(images(2, seed=number))
        running.after_pass(number)
    running.after_step()
    assert all(value.equal(before[name]) for name, value in net.state_dict().items() if "running" in name)


@pytest.mark.parametrize("policy", ["worker0", "mean"])
def test_a_pass_that_is_ignored_leaves_the_statistics_as_they_are(policy):
    net = small_network()
    running = RunningStatistics(net, policy, 0.1, groups=2, first=True, compiled=True)
    before = copy.deepcopy(net.state_dict())
    with running.ignored_pass():
        net(images(2))
        assert not net[1].running_mean.equal(before["1.running_mean"])
    assert all(value.equal(before[name]) for name, value in net.state_dict().items() if "running" in name)


@dataclass
class TwoPeers:
    """A group of two processes, the other of which contributes ``theirs``."""

    theirs: torch.Tensor
    size: int = 2

    def broadcast(self, values: torch.Tensor) -> None:
        values.copy_(self.theirs)


def test_the_mean_is_over_the_workers_of_all_processes():
    norm = torch.nn.BatchNorm1d(1).double()
    running = RunningStatistics(norm, "mean", 0.1, groups=1, first=True)
    for number, batch in enumerate(([0.0, 4.0], [4.0, 8.0])):  # means 2 and 6, variances 8
        running.before_pass(number)
        norm(torch.tensor(batch, dtype=torch.float64)[:, None])
        running.after_pass(number)
    # Another process's two workers: their means add up to 12, their variances to 40.
    running.after_step(lambda ours: ours + torch.tensor([12.0, 40.0], dtype=torch.float64), processes=2)
    assert norm.running_mean.item() == pytest.approx(0.1 * (2 + 6 + 12) / 4)
    assert norm.running_var.item() == pytest.approx(0.9 * 1 + 0.1 * (8 + 8 + 40) / 4)


@pytest.mark.parametrize(("policy", "expected"), [("worker0", 8.0), ("mean", 2.0)])
def test_processes_agree_on_the_policys_statistics(policy, expected):
    net = small_network()
    running = RunningStatistics(net, policy, 0.1, groups=1, first=False, steps=3)
    for norm in batchnorms(net):
        norm.running_mean.fill_(2.0)
        norm.running_var.fill_(2.0)
    running.synchronise(TwoPeers(torch.full((14,), 8.0, dtype=torch.float64)))
    for norm in batchnorms(net):
        assert norm.running_mean.eq(expected).all()
        assert norm.running_var.eq(expected).all()
        assert norm.num_batches_tracked == 3


def test_evaluation_uses_the_running_statistics():
    net, plain = small_network(), small_network()
    RunningStatistics(net, "worker0", 0.1, groups=4, first=True)
    x = images(1)
    assert net.eval()(x).equal(plain.eval()(x))


def test_names_and_types_survive():
    net, plain = SmallResNet(8, 10), SmallResNet(8, 10)
    RunningStatistics(net, "mean", 0.1, groups=2, first=True)
    assert list(net.state_dict()) == list(plain.state_dict())
    assert all(isinstance(norm, nn.BatchNorm2d) for norm in batchnorms(net))
    copy.deepcopy(net)


def test_batchnorms_of_timm_with_an_activation_take_statistics_by_worker():
    torch.manual_seed(0)
    net = timm.create_model("regnetx_002", num_classes=5).double().train()
    assert {type(norm).__name__ for norm in batchnorms(net)} == {"BatchNormAct2d"}
    plain = copy.deepcopy(net)
    running = RunningStatistics(net, "worker0", 0.1, groups=2, first=True)
    running.before_pass(0)
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    x[4:] *= 3
    separate = [plain(x[:4]), copy.deepcopy(plain)(x[4:])]
    torch.testing.assert_close(net(x), torch.cat(separate), rtol=1e-9, atol=1e-9)
    for name, buffer in plain.named_buffers():  # saw worker 0 alone
        if "running" in name:
            torch.testing.assert_close(dict(net.named_buffers())[name], buffer)


def test_recomputed_statistics_are_plain_means_and_leave_no_trace():
    net, plain = small_network(), small_network()
    running = RunningStatistics(net, "mean", 0.1, groups=2, first=True)
    running.before_pass(0)
    net.eval()
    before = copy.deepcopy(net.state_dict())
    momenta = [norm.momenta for norm in batchnorms(net)]
    batches = images(5).split(N)
    first = plain[0](torch.cat(batches)).detach().unflatten(0, (5, N))  # input of the first BatchNorm
    with recomputed(net, net, batches):
        assert not net.training
        torch.testing.assert_close(net[1].running_mean, first.mean((0, 1, 3, 4)))
        torch.testing.assert_close(net[1].running_var, first.transpose(1, 2).flatten(2).var(2).mean(0))
        assert not net[4].running_mean.equal(before["4.running_mean"])
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert [norm.momenta for norm in batchnorms(net)] == momenta


def test_running_statistics_come_back_after_an_error():
    net = small_network()
    RunningStatistics(net, "worker0", 0.1, groups=1, first=True)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ZeroDivisionError), recomputed(net, net, [images(1)]):
        raise ZeroDivisionError
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())


def test_statistics_across_processes_are_refused():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SyncBatchNorm(4))
    with pytest.raises(UserError, match=r"'1' \(SyncBatchNorm\) takes statistics over the batch"):
        RunningStatistics(net, "worker0", 0.1, groups=1, first=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)  # the compiler's own
@pytest.mark.parametrize(("policy", "groups", "kernel"), [("worker0", 1, "separate"), ("mean", 4, "joint")])
def test_a_compiled_pass_has_no_graph_break_and_the_same_results(monkeypatch, tmp_path, policy, groups, kernel):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a killed test may have left half a kernel elsewhere
    results = []
    for compiled in (False, True):
        net = small_network()
        running = RunningStatistics(net, policy, 0.1, groups, first=True, kernel=kernel if compiled else "separate")
        if compiled:
            net.compile(fullgraph=True, dynamic=False)  # raises at a graph break
        for number in range(2):
            running.before_pass(number)
            squared(net(images(groups, seed=number))).backward()
            running.after_pass(number)
        running.after_step()
        results.append([*(p.grad for p in net.parameters()), *(b for b in net.buffers() if b.is_floating_point())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-9)


def test_a_step_after_an_evaluation_with_recomputed_statistics_counts_as_any_other():
    net, plain = small_network(), small_network()
    running = RunningStatistics(net, "worker0", 0.1, groups=1, first=True)
    for step in range(2):
        for number, part in enumerate(images(2, seed=step).split(N)):
            running.before_pass(number)
            net(part)
            if number == 0:
                plain(part)
        assert net.eval()(images(1)).equal(plain.eval()(images(1)))
        with recomputed(net, net, [images(1, seed=7)]):
            assert not net(images(1)).equal(plain(images(1)))
        net.train()
        plain.train()
    assert all(net.state_dict()[name].equal(buffer) for name, buffer in plain.named_buffers() if "running" in name)
