"""Time `largebatch bench offload` beside accelerate's and diffusers' offloading.

    uv sync --group bench
    python scripts/peers/offloading.py [key=value ...]

Takes what `largebatch bench offload` takes.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

from largebatch.bench import offload
from largebatch.cli.main import main


def accelerate_cpu_offload(model: nn.Module, device: torch.device, stack: ExitStack) -> Callable[[], None]:
    """Let each layer's weights visit the device for its own forward pass."""
    from accelerate import cpu_offload

    cpu_offload(model, device, offload_buffers=True)
    return lambda: None


def accelerate_cpu_offload_with_hook(model: nn.Module, device: torch.device, stack: ExitStack) -> Callable[[], None]:
    """Bring the whole model to the device, and back after every pass."""
    from accelerate import cpu_offload_with_hook

    _, hook = cpu_offload_with_hook(model, device)
    return hook.offload


def diffusers_leaf(model: nn.Module, device: torch.device, stack: ExitStack) -> Callable[[], None]:
    """Let each leaf's weights visit the device, on a stream of their own on a GPU."""
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(model, device, offload_type="leaf_level", use_stream=device.type == "cuda")
    return lambda: None


SIDES = {
    accelerate_cpu_offload: "accelerate cpu_offload",
    accelerate_cpu_offload_with_hook: "accelerate cpu_offload_with_hook",
    diffusers_leaf: "diffusers group offloading, leaf",
}


if __name__ == "__main__":
    for side, line in SIDES.items():
        offload.PEERS[side.__name__] = side
        offload.NAMES[side.__name__] = line
    sys.argv[1:1] = ["bench", "offload"]
    main()
