"""On a quadratic with a known Hessian and known noise, every quantity equals its closed form."""

import math

import pytest
import torch
from torch.optim import SGD

from largebatch.training.drift import SmallStep, follow, gradient, hessian_product, sharpness, stability_bound

CURVATURES = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


def quadratic(weights, noise):
    """½ wᵀ H w − ξᵀ w, H diagonal: the gradient is H w − ξ. Cut into two layers."""
    w = torch.cat([weights["a.weight"], weights["b.weight"]])
    return 0.5 * (CURVATURES * w * w).sum() - (noise * w).sum()


def split(w):
    return {"a.weight": w[:1].clone(), "b.weight": w[1:].clone()}


def zeros():
    return split(torch.zeros(3, dtype=torch.float64))


def test_drift_along_plain_steps_is_that_of_the_closed_form():
    """Without noise w_j = (1 − ηλ)^j w_0, and the gradient is λ w_j."""
    rate, k = 0.1, 6
    found = follow(quadratic, split(START), zeros(), [torch.zeros(3)] * k, SmallStep(rate), samples=1)
    slope = [CURVATURES * (1 - rate * CURVATURES) ** j * START for j in range(k)]
    for j in range(1, k):
        cosine = (slope[0] @ slope[j]) / (slope[0].norm() * slope[j].norm())
        assert found.cosine[j - 1] == pytest.approx(float(cosine), rel=1e-12)
        distance = (slope[j] - slope[0]).norm() / slope[0].norm()
        assert found.distance[j - 1] == pytest.approx(float(distance), rel=1e-12)
    small = {j: (1 - rate * CURVATURES) ** j * START for j in range(k + 1)}
    for steps in range(1, k + 1):
        large = START - steps * rate * slope[0]  # the paper's ŵ, for η̂ = kη
        expected = (large - small[steps]).norm() / (small[steps] - START).norm()
        assert found.end_point[steps - 1] == pytest.approx(float(expected), rel=1e-12, abs=1e-15)
    layer = found.layers["a"]["end_point"]
    shrink = 1 - (1 - rate * 4.0) ** k
    assert layer == pytest.approx(abs(k * rate * 4.0 - shrink) / shrink, rel=1e-12)


def test_end_point_reaches_one_just_inside_the_stability_of_the_large_step():
    """One direction: e = kηλ / (1 − (1 − ηλ)^k) − 1, which for small ηλ is 1 at kηλ = 1.594: below 2."""
    rate, k = 0.001 / 4, 1594
    weights = {"a.weight": torch.ones(1, dtype=torch.float64), "b.weight": torch.zeros(2, dtype=torch.float64)}
    found = follow(quadratic, weights, zeros(), [torch.zeros(3)] * k, SmallStep(rate), samples=1)
    assert found.end_point[-1] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_small_steps_are_those_of_the_optimizer(momentum, nesterov):
    """With its momentum from before, its weight decay and its form, over minibatches that differ."""
    parameter = torch.nn.Parameter(START.clone())
    optimizer = SGD([parameter], lr=0.05, momentum=momentum, nesterov=nesterov, weight_decay=0.01)
    noises = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slopes = []
    for number, noise in enumerate(noises):
        if number == 3:
            begin = parameter.detach().clone()
            u = optimizer.state[parameter].get("momentum_buffer")
            u = torch.zeros(3, dtype=torch.float64) if u is None else u.clone()
        parameter.grad = CURVATURES * parameter.detach() - noise
        slopes.append(parameter.grad.clone())
        optimizer.step()
    decay = {"a.weight": 0.01, "b.weight": 0.01}
    before = split(begin)
    found = follow(quadratic, before, split(u), noises[3:], SmallStep(0.05, momentum, nesterov, decay), samples=1)
    way, fixed = torch.stack(slopes[3:]).sum(0), (CURVATURES * begin - noises[3:]).sum(0)
    assert found.end_point[-1] == pytest.approx(float((fixed - way).norm() / way.norm()), rel=1e-12)
    assert torch.equal(before["a.weight"], begin[:1])  # left as they were


def test_noise_scale_is_unbiased():
    """Per-sample noise of known covariance: |G|² and tr Σ come out right on average, each within four of its errors."""
    n, k, trials = 4, 8, 400
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    estimates = []
    for _ in range(trials):
        samples = scale * torch.randn(k, n, 3, dtype=torch.float64, generator=generator)
        found = follow(quadratic, split(START), zeros(), samples.mean(1), SmallStep(0.01), samples=n)
        layers = [found.layers["b"][name] for name in ("gradient_squared", "noise_trace")]
        estimates.append([found.gradient_squared, found.noise_trace, *layers])
    estimates = torch.tensor(estimates, dtype=torch.float64)
    slope = CURVATURES * START
    expected = [slope.square().sum(), scale.square().sum(), slope[1:].square().sum(), scale[1:].square().sum()]
    errors = estimates.std(0) / math.sqrt(trials)
    assert ((estimates.mean(0) - torch.stack(expected)).abs() < 4 * errors).all()
    assert (errors < 0.05 * torch.stack(expected)).all()  # so that a factor would show


def test_a_single_minibatch_says_nothing_of_noise():
    found = follow(quadratic, split(START), zeros(), [torch.zeros(3)], SmallStep(0.1), samples=4)
    assert math.isnan(found.noise_trace)
    assert found.cosine == []


@pytest.mark.parametrize("curvatures", [[5.0, 2.0, 1.0], [-9.0, 3.0, 1.0], [-4.0, -2.0, -1.0], [0.0, 0.0, 0.0]])
def test_sharpness_is_the_largest_eigenvalue_also_below_a_larger_negative_one(curvatures):
    """Turned by an orthogonal matrix; minibatches whose Hessians differ are averaged."""
    generator = torch.Generator().manual_seed(2)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))[0]
    hessian = turn @ torch.diag(torch.tensor(curvatures, dtype=torch.float64)) @ turn.T

    def loss(weights, factor):
        w = torch.cat(list(weights.values()))
        return factor * 0.5 * w @ hessian @ w

    product = hessian_product(loss, split(START), lambda: (0.5, 1.5))
    vector = torch.randn(3, dtype=torch.float64, generator=generator)
    assert torch.allclose(product(vector), hessian @ vector)
    found = sharpness(product, vector, products=400, tolerance=1e-9)
    assert found.value == pytest.approx(max(curvatures), abs=1e-6)
    assert found.converged
    assert sharpness(product, vector, products=1, tolerance=1e-9).converged is (max(map(abs, curvatures)) == 0)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.9, False), (0.5, True), (0.9, True)])
def test_the_stability_bound_is_where_the_optimizer_begins_to_diverge(momentum, nesterov):
    for side, diverges in ((0.98, False), (1.02, True)):
        parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        curvature = 2.5
        rate = side * stability_bound(momentum, nesterov) / curvature
        optimizer = SGD([parameter], lr=rate, momentum=momentum, nesterov=nesterov)
        for _ in range(2000):
            parameter.grad = curvature * parameter.detach()
            optimizer.step()
        assert (float(parameter.abs().detach()) > 1) is diverges


def test_gradient_leaves_no_trace():
    weights = {"used": torch.ones(2, requires_grad=True), "unused": torch.ones(3, requires_grad=True)}
    found = gradient(lambda w, _: w["used"].square().sum(), weights, None)
    assert found["used"].tolist() == [2, 2]
    assert found["unused"].tolist() == [0, 0, 0]
    assert weights["used"].grad is None
