"""Several threads and one model: right numbers, or a sentence."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from largebatch.base.errors import UserError
from largebatch.offloading import each, offload

PATIENCE = 60.0  # s, until a thread that should have gone on counts as stuck


def chain():
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(6))).eval()


class Branches(nn.Module):
    """Two branches of several layers, each in a thread of its own."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool
        self.left, self.right, self.last = chain(), chain(), nn.Linear(32, 32)

    def forward(self, hidden):
        def run(branch):
            with torch.no_grad():
                for layer in branch:
                    hidden_here.append(layer(hidden))
                return hidden_here[-1]

        hidden_here = [hidden]
        if self.pool is None:
            return self.last(run(self.left) + run(self.right))
        return self.last(sum(future.result() for future in [self.pool.submit(run, b) for b in (self.left, self.right)]))


@pytest.mark.parametrize("mode", ["none", "submodule", "model"])
def test_threads_that_call_one_model_get_what_is_theirs(mode):
    torch.manual_seed(0)
    model, batches = chain(), [torch.randn(2, 32) for _ in range(200)]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]

    def call(batch):
        with torch.no_grad():
            return model(batch)

    with offload(model, "cpu", mode=mode, groups="leaf") as statistics, ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(call, batches))
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    assert statistics.passes == 200
    assert statistics.departures == 0


def test_threads_that_call_several_models_in_turns():
    torch.manual_seed(0)
    models, batches = {name: chain() for name in "abc"}, [torch.randn(2, 32) for _ in range(20)]
    jobs = [(name, batch) for batch in batches for name in models]
    with torch.no_grad():
        expected = [models[name](batch) for name, batch in jobs]

    def call(job):
        with torch.inference_mode():
            return models[job[0]](job[1])

    for mode in ("submodule", "model"):
        with offload(models, "cpu", mode=mode, groups="leaf"), ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(call, jobs))
        assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("mode", ["none", "model"])
def test_branches_in_other_threads_where_all_weights_are_there(mode):
    with ThreadPoolExecutor(2) as pool:
        model, batch = Branches(None).eval(), torch.randn(2, 32)
        with torch.no_grad():
            expected = model(batch)
        model.pool = pool
        with offload(model, "cpu", mode=mode):
            for _ in range(20):
                assert torch.equal(model(batch), expected)


@pytest.mark.parametrize("first", [None, "pool"])
def test_branches_in_other_threads_are_refused_where_weights_take_turns(first):
    """In the first pass, and in a later one; and then the model goes on."""
    with ThreadPoolExecutor(2) as pool:
        model, batch = Branches(None).eval(), torch.randn(2, 32)
        with torch.no_grad():
            expected = model(batch)
        with offload(model, "cpu", groups="leaf"):
            if first is None:
                model(batch)
            model.pool = pool
            with pytest.raises(UserError, match=r"is called by thread .* while thread MainThread is .*mode=no"):
                model(batch)
            model.pool = None
            assert torch.equal(model(batch), expected)


def test_a_module_that_is_called_alone_waits_for_nothing_and_leaves_nothing():
    model, batch = chain(), torch.randn(2, 32)
    with torch.no_grad():
        expected = model[3](batch), model(batch)

    def call(_):
        with torch.no_grad():
            return model(batch)

    for mode in ("submodule", "model"):
        with offload(model, "cpu", mode=mode, groups="leaf"):
            assert torch.equal(model[3](batch), expected[0])
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(call, None).result(PATIENCE), expected[1])
            assert torch.equal(model[3](batch), expected[0])


@pytest.mark.parametrize("mode", ["submodule", "model"])
def test_the_context_ends_after_the_passes_of_other_threads(mode):
    """Weights that come home while another thread computes with them would be neither here nor there."""
    model, batch, inside, go = chain(), torch.randn(2, 32), threading.Event(), threading.Event()
    with torch.no_grad():
        expected = model(batch)
    outputs = []
    hook = model[3].register_forward_hook(lambda *_: inside.set() or (go.wait(PATIENCE) and None))

    def call():
        with torch.no_grad():
            outputs.append(model(batch))

    thread = threading.Thread(target=call)
    with contextlib.ExitStack() as stack:
        stack.enter_context(offload(model, "cpu", mode=mode, groups="leaf"))
        thread.start()
        assert inside.wait(PATIENCE)
        ends = threading.Timer(0.05, go.set)  # while the context waits; any time is right
        ends.start()
    thread.join(PATIENCE)
    hook.remove()
    assert torch.equal(outputs[0], expected)
    assert torch.equal(call() or outputs[1], expected)


def test_after_an_interrupt_other_threads_go_on():
    """Hooks that come last are not called then; the next pass of the interrupted thread ends what was left."""
    model, batch = chain(), torch.randn(2, 32)
    with torch.no_grad():
        expected = model(batch)

    def interrupt(*_):
        raise KeyboardInterrupt

    def call(_):
        with torch.no_grad():
            return model(batch)

    for mode in ("submodule", "model"):
        with offload(model, "cpu", mode=mode, groups="leaf"):
            hook = model[3].register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(batch)
            hook.remove()
            assert torch.equal(model(batch), expected)
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(call, None).result(PATIENCE), expected)


def test_batches_that_share_an_upload_and_another_thread_take_turns():
    model, batches = chain(), [torch.randn(2, 32) for _ in range(30)]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]

    def several():
        with torch.no_grad():
            return list(each(model, batches, 3))

    with offload(model, "cpu", groups="leaf"), ThreadPoolExecutor(3) as pool:
        found = [pool.submit(several) for _ in range(3)]
        for outputs in (one.result(PATIENCE) for one in found):
            assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


class Calls(nn.Module):
    """A model that calls another one, and itself."""

    def __init__(self, other):
        super().__init__()
        self.first, self.second, self.other = nn.Linear(32, 32), nn.Linear(32, 32), [other]

    def forward(self, hidden, depth=1):
        hidden = self.other[0](self.first(hidden))
        return self.second(self(hidden, depth - 1) if depth else hidden)


@pytest.mark.parametrize("mode", ["none", "submodule", "model"])
def test_a_model_that_calls_another_one_and_itself(mode):
    other, batch = chain(), torch.randn(2, 32)
    model = Calls(other).eval()
    with torch.no_grad():
        expected = model(batch)
    with offload({"model": model, "other": other}, "cpu", mode=mode, groups="leaf"):
        for _ in range(3):
            assert torch.equal(model(batch), expected)
