"""The loss of a sample: cross-entropy, or a callable of the user's own."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from largebatch.base.errors import UserError
from largebatch.base.user_code import calling, load
from largebatch.config.groups import LossConfig

Loss = Callable[[Tensor, Tensor], Tensor]


def make_loss(config: LossConfig) -> Loss:
    """Return l(outputs, labels), from outputs (batch, classes) and labels int64 (batch,) to one value each, (batch,).

    Raises:
        UserError: a callable that cannot be imported.
    """
    if config.own:
        return functools.partial(_own, config.name, load("loss.name", config.name))
    return functools.partial(F.cross_entropy, reduction="none", label_smoothing=config.label_smoothing)


def validation_loss(config: LossConfig) -> Loss | None:
    """Return the loss by which validation measures; None: the cross-entropy, without label smoothing."""
    return make_loss(config) if config.own else None


def _own(name: str, function: Loss, outputs: Tensor, labels: Tensor) -> Tensor:
    call = f"loss.name={name}"
    expected = (
        f"called with (outputs, labels) of shapes {tuple(outputs.shape)} and {tuple(labels.shape)}, and has to return "
        f"one value for each sample, of shape {tuple(labels.shape)}"
    )
    with calling(call, expected):
        values = function(outputs, labels)
    if not isinstance(values, Tensor) or values.shape != labels.shape:
        shape = f" of shape {tuple(values.shape)}" if isinstance(values, Tensor) else ""
        raise UserError(
            f"{call} returned a {type(values).__name__}{shape}: it is {expected}. A mean has no samples left."
        )
    return values
