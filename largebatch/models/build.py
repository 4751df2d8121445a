"""From a name to a network, and from a network to the paper's starting weights."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from largebatch.base.errors import UserError, nearest
from largebatch.base.user_code import MODELS, blamed, calling, load
from largebatch.config.groups import ModelConfig
from largebatch.models.resnet import SmallResNet, block_types


def build_model(config: ModelConfig, classes: int, channels: int) -> nn.Module:
    """Make a network with the library's own initialisation.

    Args:
        config: Its name and source.
        classes: Width of the output.
        channels: Channels of the input.

    Raises:
        UserError: a name that the source does not have (the nearest is named), or a shape it does not take.
    """
    if config.source == "own":
        return _own(config, classes, channels)
    if config.source == "python":
        return _python(config, classes, channels)
    if not config.name or config.name == "null":
        raise UserError(f"model={config.source} needs model.name, such as model.name=resnet18.")
    return (
        _torchvision(config, classes, channels) if config.source == "torchvision" else _timm(config, classes, channels)
    )


def build_on_meta(config: ModelConfig, classes: int, channels: int) -> nn.Module:
    """Make a network of shapes alone, which takes neither memory nor time; the user's own is made as it is."""
    if config.source == "python":  # its code may compute with its weights
        with torch.random.fork_rng(devices=[]):
            return build_model(config, classes, channels)
    with torch.device("meta"):
        return build_model(config, classes, channels)


def check_shapes(
    config: ModelConfig, classes: int, inputs: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> None:
    """Send the shapes of a worker's batch through a network in training mode.

    Args:
        config: The network.
        classes: Width of its output.
        inputs: (n, C, H, W) of images, or (n, …) of whatever the network takes.
        dtype: Of the inputs.

    Raises:
        UserError: n = 1 with BatchNorm over a 1×1 map, inputs that the network cannot take, or an output that
            is not logits alone.
    """
    # On the meta device a pass would import PyTorch's compiler, and the user's code may not run: two samples suffice.
    if config.source in ("own", "python"):
        with torch.random.fork_rng(devices=[]):
            model = build_model(config, classes, channels_of(inputs[1:]))
        batch = torch.zeros(min(inputs[0], 2), *inputs[1:], dtype=dtype)
    else:
        model, batch = build_on_meta(config, classes, channels_of(inputs[1:])), torch.empty(inputs, device="meta")
    model.train()
    shape = "×".join(map(str, inputs[1:]))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            logits = model(batch)
    except Exception as error:  # whatever the user's code raises
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            raise UserError(
                f"n={inputs[0]} leaves a BatchNorm of model.name={config.name} a single value for each channel (a 1×1 "
                "map): its statistics would be of one sample. Use n ≥ 2."
            ) from None
        if mine := blamed(error, f" The network was called with a {batch.dtype} tensor of shape {tuple(batch.shape)}."):
            raise mine from error
        if isinstance(error, RuntimeError | AssertionError):  # the latter from vision transformers, made for one size
            what = "images" if len(inputs) == 4 else "inputs"
            reason = " ".join(str(error).split()).rstrip(".!") or type(error).__name__
            other = f"model.kwargs={{img_size: {inputs[-1]}}} makes a network of this size, if it takes that; else "
            raise UserError(
                f"model.name={config.name} does not take {what} of {shape}: {reason}. "
                f"{other if isinstance(error, AssertionError) else ''}use another network, or other dataset.height and "
                "dataset.width."
            ) from None
        raise
    if not isinstance(logits, torch.Tensor) or logits.shape != (len(batch), classes):
        raise UserError(
            f"model.name={config.name} does not return logits of shape (n, classes) = ({len(batch)}, {classes}) in "
            f"training mode, but {_kind(logits)}: networks with auxiliary outputs are not supported."
        )


def channels_of(shape: Sequence[int]) -> int:
    """Return the channels of an input: its first size, 1 for a single number."""
    return shape[0] if shape else 1


def _kind(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    return type(value).__name__ + shape


def _python(config: ModelConfig, classes: int, channels: int) -> nn.Module:
    key, kwargs = f"model.name={config.name}", config.kwargs or {}
    make = load("model.name", config.name, MODELS)
    arguments = ", ".join(
        f"{name}={value!r}" for name, value in {"classes": classes, "channels": channels, **kwargs}.items()
    )
    with calling(key, f"called with ({arguments}), and has to return an nn.Module"):
        model = make(classes=classes, channels=channels, **kwargs)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{key} returned {_kind(model)}: it is called with ({arguments}), and has to return an nn.Module."
        )
    return model


def _own(config: ModelConfig, classes: int, channels: int) -> nn.Module:
    match = re.fullmatch(r"resnet(\d+)", config.name)
    depth = int(match[1]) if match else 0
    if depth < 8 or (depth - 2) % 6:
        raise UserError(
            f"model.name={config.name} is not one of our small networks: resnet8, resnet14, resnet20, … (6m + 2 "
            "layers). For others use model=torchvision or model=timm with model.name."
        )
    if config.kwargs:
        raise UserError("our small networks take no model.kwargs: use model.stem_stride, or leave them out.")
    return SmallResNet(depth, classes, channels, config.stem_stride)


def _torchvision(config: ModelConfig, classes: int, channels: int) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
    if config.name not in names:
        raise UserError(f"model.name={config.name} is not a torchvision classifier.{nearest(config.name, names)}")
    if channels != 3:
        raise UserError(
            f"model.name={config.name} takes images of 3 channels, these have {channels}: use one of our own "
            f"(model=resnet8, resnet20, resnet56) or timm's (model=timm model.name={config.name})."
        )
    with _constructing(config):
        model: nn.Module = models.get_model(config.name, weights=None, num_classes=classes, **(config.kwargs or {}))
    return model


def _timm(config: ModelConfig, classes: int, channels: int) -> nn.Module:
    import timm

    names = timm.list_models()
    if config.name.split(".")[0] not in names:
        raise UserError(f"model.name={config.name} is not a timm model.{nearest(config.name, names)}")
    arguments: dict[str, Any] = {"num_classes": classes, "in_chans": channels, **(config.kwargs or {})}
    with _constructing(config):
        model: nn.Module = timm.create_model(config.name, pretrained=False, **arguments)
    return model


@contextlib.contextmanager
def _constructing(config: ModelConfig) -> Iterator[None]:
    """Word an argument that a library's network does not take."""
    try:
        yield
    except (TypeError, ValueError, AssertionError) as error:
        if not config.kwargs:
            raise
        raise UserError(
            f"model.name={config.name} does not take model.kwargs={dict(config.kwargs)}: {error}."
        ) from None


def _last_batchnorm(block: nn.Module) -> _BatchNorm | None:
    """Return the last BN on a residual block's main branch, or None for a module that is no such block."""
    last: Any
    if isinstance(block, block_types("Bottleneck")):
        last = block.bn3
    elif isinstance(block, block_types("BasicBlock")):
        last = block.bn2
    else:
        return None
    return last if isinstance(last, _BatchNorm) else None


def residual_batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the last BN of every residual block by the block's name: those that the paper starts at γ = 0."""
    found = {name: _last_batchnorm(module) for name, module in model.named_modules()}
    return {name: last for name, last in found.items() if last is not None}


def wants_paper_init(model: nn.Module, config: ModelConfig) -> bool:
    """Whether the paper's initialisation applies: where asked for, and by default to residual networks."""
    return config.init == "paper" or (config.init == "auto" and bool(residual_batchnorms(model)))


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig) -> list[str]:
    """Draw the paper's starting weights (section 5.1) from torch's current CPU generator, in place.

    Convolutions: He's normal distribution over the outputs. Linear layers: N(0, 0.01²), bias 0. BN: β = 0 and
    γ = 1, but γ = 0 in the last BN of every residual block.

    Returns:
        What could not be applied, a sentence each.
    """
    if not wants_paper_init(model, config):
        why = "requested" if config.init == "own" else "not a residual network whose blocks are known"
        whose = "the network" if config.source == "python" else config.source
        return [f"initialisation is {whose}'s own ({why})"]
    notes = []
    # On the meta device there is nothing to draw, and a normal distribution there would import PyTorch's compiler.
    for module in model.modules() if not any(p.is_meta for p in model.parameters()) else ():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, _BatchNorm) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    last = residual_batchnorms(model)
    if config.zero_gamma:
        for norm in last.values():
            nn.init.zeros_(norm.weight)
        if not last:
            notes.append("γ = 0 in the last BN of residual blocks: no block of a known kind was found")
    kept = sorted({type(m).__name__ for m in model.modules() if _draws_its_own(m)})
    if kept:
        notes.append(f"the paper does not specify {', '.join(kept)}: their own initialisation stays")
    return notes


def _draws_its_own(module: nn.Module) -> bool:
    known = (nn.Conv2d, nn.Linear, _BatchNorm)
    return not isinstance(module, known) and any(True for _ in module.parameters(recurse=False))


def draws_numbers(model: nn.Module, sample: Tensor) -> bool:
    """Whether a training pass draws random numbers, whatever draws them: tried on a copy of the model, on the CPU.

    Args:
        model: Left as it is.
        sample: Shape and type of an input.
    """
    batch = torch.zeros((2, *sample.shape), dtype=sample.dtype)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = torch.get_rng_state()
        copy.deepcopy(model).cpu().float().train()(batch)
        return not torch.equal(before, torch.get_rng_state())


def is_stochastic(model: nn.Module) -> bool:
    """Whether a module of the network draws random numbers in training passes: dropout, stochastic depth."""
    rates = (getattr(module, name, 0.0) for module in model.modules() for name in ("p", "drop_prob"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
