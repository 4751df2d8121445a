"""The quantities themselves, for any loss of named weights: nothing here knows a run, a network or a data set."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Weights = dict[str, Tensor]
Loss = Callable[[Weights, T], Tensor]

ALL = ""  # in figures by layer: the whole network


def gradient(loss: Loss[T], weights: Weights, batch: T) -> Weights:
    """Return ∇l at ``weights``, zero for weights that the loss does not use; no ``.grad`` is touched."""
    found = torch.autograd.grad(loss(weights, batch), list(weights.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if part is None else part.detach()
        for (name, value), part in zip(weights.items(), found, strict=True)
    }


@dataclass(frozen=True)
class SmallStep:
    """SGD's update as the run makes it: u ← m u + g + λ w; w ← w − η u, or by Nesterov w ← w − η (g + λ w + m u).

    ``rate`` is η of a small step; ``decay`` is λ by name, 0 where it is left out.
    """

    rate: float
    momentum: float = 0.0
    nesterov: bool = False
    decay: Mapping[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def apply(self, weights: Weights, velocity: Weights, gradients: Weights) -> None:
        """Move weights and velocity in place."""
        for name, weight in weights.items():
            direction = gradients[name].add(weight, alpha=self.decay.get(name, 0.0))
            u = velocity[name].mul_(self.momentum).add_(direction)
            weight.sub_(direction.add(u, alpha=self.momentum) if self.nesterov else u, alpha=self.rate)


@dataclass
class Following:
    """Gradients of k small steps from w_t, and of the same k minibatches at w_t.

    Attributes:
        cosine: Of ∇l(B_j, w_t) and ∇l(B_j, w_{t+j}), for j = 1 … k − 1.
        distance: ‖∇l(B_j, w_{t+j}) − ∇l(B_j, w_t)‖ / ‖∇l(B_j, w_t)‖, for j = 1 … k − 1.
        end_point: ‖ŵ_{t+1} − w_{t+k'}‖ / ‖w_{t+k'} − w_t‖ for k' = 1 … k and η̂ = k'η, where both sides take the whole
            effect of their gradients: momentum multiplies it by 1/(1 − m) on both, so that what is left is
            ‖Σ_j ∇l(B_j, w_t) − Σ_j ∇l(B_j, w_{t+j})‖ / ‖Σ_j ∇l(B_j, w_{t+j})‖.
        gradient_squared: An unbiased estimate of |G|², G the expected gradient; may come out below 0.
        noise_trace: An unbiased estimate of tr Σ, Σ the covariance of a single sample's gradient.
        layers: For every layer, ``end_point`` at k, ``gradient_squared`` and ``noise_trace``.
    """

    cosine: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    end_point: list[float] = field(default_factory=list)
    gradient_squared: float = math.nan
    noise_trace: float = math.nan
    layers: dict[str, dict[str, float]] = field(default_factory=dict)


def follow(
    loss: Loss[T], start: Weights, velocity: Weights, batches: Iterable[T], step: SmallStep, samples: int
) -> Following:
    """Make a small step for every minibatch, and hold its gradient against the one at the start.

    Takes 2k − 1 back-propagations and memory for seven times the weights, whatever k is.

    Args:
        loss: The mean over a minibatch.
        start: w_t, left as they are.
        velocity: u, the momentum that the steps begin with; left as it is.
        batches: B_0 … B_{k−1}, of equal size.
        step: One of the small steps.
        samples: n, in a minibatch.
    """
    start = {name: value.detach().requires_grad_() for name, value in start.items()}
    here = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
    velocity = {name: value.clone() for name, value in velocity.items()}
    at_start, on_the_way = _zeros(start), _zeros(start)
    squares: dict[str, float] = defaultdict(float)
    result, count = Following(), 0
    for batch in batches:
        fixed = gradient(loss, start, batch)
        moving = gradient(loss, here, batch) if count else fixed
        step.apply(here, velocity, moving)
        _add(at_start, fixed)
        _add(on_the_way, moving)
        for layer, value in squared_norms(fixed).items():
            squares[layer] += value
        if count:
            norm, apart = norm_of(fixed), norm_of(_minus(moving, fixed))
            result.cosine.append(_ratio(_dot(fixed, moving), norm * norm_of(moving)))
            result.distance.append(_ratio(apart, norm))
        result.end_point.append(_ratio(norm_of(_minus(at_start, on_the_way)), norm_of(on_the_way)))
        count += 1
    _split_noise(result, squares, squared_norms(at_start), count, samples)
    apart_by_layer, moved_by_layer = squared_norms(_minus(at_start, on_the_way)), squared_norms(on_the_way)
    for layer, figures in result.layers.items():
        figures["end_point"] = math.sqrt(_ratio(apart_by_layer[layer], moved_by_layer[layer]))
    return result


def _split_noise(
    result: Following, squares: Mapping[str, float], sum_squared: Mapping[str, float], count: int, samples: int
) -> None:
    """Estimate |G|² and tr Σ from two sizes of minibatch, n and kn (McCandlish et al., 2018, appendix A.1)."""
    if count < 2:
        return
    for layer, value in squares.items():
        small, large = value / count, sum_squared[layer] / count**2
        figures = {
            "gradient_squared": (count * large - small) / (count - 1),
            "noise_trace": samples * count * (small - large) / (count - 1),
        }
        if layer == ALL:
            result.gradient_squared, result.noise_trace = figures["gradient_squared"], figures["noise_trace"]
        else:
            result.layers[layer] = figures


@dataclass(frozen=True)
class Sharpness:
    """The largest eigenvalue of the Hessian, the products that it took, and whether it stands still."""

    value: float
    products: int
    converged: bool


def hessian_product(loss: Loss[T], weights: Weights, batches: Callable[[], Iterable[T]]) -> Callable[[Tensor], Tensor]:
    """Return v ↦ H v for the Hessian of the mean loss over some minibatches, by differentiating the gradient twice.

    Args:
        loss: The mean over a minibatch.
        weights: Where; left as they are.
        batches: Gives the minibatches, anew for every product.
    """
    weights = {name: value.detach().requires_grad_() for name, value in weights.items()}
    values = list(weights.values())

    def product(vector: Tensor) -> Tensor:
        parts = [
            part.view_as(value)
            for part, value in zip(torch.split(vector, [value.numel() for value in values]), values, strict=True)
        ]
        total, count = torch.zeros_like(vector), 0
        for batch in batches():
            slope = torch.autograd.grad(loss(weights, batch), values, create_graph=True, materialize_grads=True)
            along = torch.stack([(one * part).sum() for one, part in zip(slope, parts, strict=True)]).sum()
            curved = torch.autograd.grad(along, values, materialize_grads=True)
            total += torch.cat([one.flatten() for one in curved])
            count += 1
        return total / count

    return product


def sharpness(product: Callable[[Tensor], Tensor], vector: Tensor, products: int, tolerance: float) -> Sharpness:
    """Return the largest eigenvalue λ_max of a symmetric matrix by power iteration.

    Power iteration finds the eigenvalue of largest magnitude. Where that is negative it goes on with H − λ_min I,
    whose largest is λ_max − λ_min.

    Args:
        product: v ↦ H v.
        vector: Where to start, of any length but 0.
        products: How many it may take, in each of the two.
        tolerance: ‖H v − λ v‖ / |λ| at which v counts as an eigenvector; λ is then wrong by less, about its square.
    """
    first = _power(product, vector, products, tolerance)
    if not first.value < 0:
        return first
    second = _power(lambda one: product(one) - first.value * one, vector, products, tolerance)
    taken = first.products + second.products
    return Sharpness(second.value + first.value, taken, first.converged and second.converged)


def _power(product: Callable[[Tensor], Tensor], vector: Tensor, products: int, tolerance: float) -> Sharpness:
    # Not until the eigenvalue stands still: far from an eigenvector it may do so by chance.
    value = math.nan
    vector = vector / vector.norm()
    for number in range(1, products + 1):
        image = product(vector)
        value = float(vector @ image)
        length = image.norm()
        if not length > 0:  # a flat loss, or one that is not finite
            return Sharpness(value, number, value == 0)
        if (image - value * vector).norm() <= tolerance * abs(value):
            return Sharpness(value, number, True)
        vector = image / length
    return Sharpness(value, products, False)


def stability_bound(momentum: float, nesterov: bool) -> float:
    """Return the largest η λ at which this form of momentum descends a quadratic of curvature λ without diverging.

    Heavy ball, w ← w − η u: 2 + 2m. Nesterov, w ← w − η (g + m u): with a = ηλ the steps obey
    z² − (1 + m)(1 − a) z + m (1 − a) = 0, whose root leaves the unit circle at z = −1: (2 + 2m) / (1 + 2m).
    Both are 2 without momentum.
    """
    return (2 + 2 * momentum) / (1 + 2 * momentum if nesterov else 1)


def squared_norms(tensors: Weights) -> dict[str, float]:
    """Return squared lengths by layer, a parameter's name without its last part, and of all under ``ALL``."""
    squares = [norm**2 for norm in torch.stack(torch._foreach_norm(list(tensors.values()))).tolist()]
    by_layer: dict[str, float] = defaultdict(float)
    for name, square in zip(tensors, squares, strict=True):
        by_layer[name.rpartition(".")[0] or name] += square
    return {**by_layer, ALL: sum(squares)}


def norm_of(tensors: Weights) -> float:
    """Return the length of all tensors together."""
    return math.sqrt(squared_norms(tensors)[ALL])


def _zeros(like: Weights) -> Weights:
    return {name: torch.zeros_like(value) for name, value in like.items()}


def _add(total: Weights, term: Weights) -> None:
    torch._foreach_add_(list(total.values()), list(term.values()))


def _minus(one: Weights, other: Weights) -> Weights:
    return dict(zip(one, torch._foreach_sub(list(one.values()), list(other.values())), strict=True))


def _dot(one: Weights, other: Weights) -> float:
    products: Sequence[Tensor] = torch._foreach_mul(list(one.values()), list(other.values()))
    return float(torch.stack([product.sum() for product in products]).sum())


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else (0.0 if numerator == 0 else math.inf)
