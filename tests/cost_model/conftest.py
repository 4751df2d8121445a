from dataclasses import replace

import pytest

from largebatch.cost_model.profile import Link, Pass, Profile


@pytest.fixture
def profile():
    """Return a function that makes a profile with round numbers, changed by its arguments.

    A pass takes 100 ms, 60 of them back-propagation; 80 MB of gradients in 4 messages; 2 GPUs a node, 80 Gbit/s
    (10 GB/s) and 1 ms between them, 8 Gbit/s (1 GB/s) and 2 ms between nodes.
    """
    usual = Profile(
        schema=1,
        source="",
        machine="",
        device="a GPU",
        model="resnet50",
        images="3×224×224",
        precision="fp32",
        n=32,
        train_images=32_000,
        val_images=0,
        passes=(Pass(workers=1, mean_ms=100.0, std_ms=0.0, backward_ms=60.0, steps_ms=()),),
        update_ms=5.0,
        gradient_bytes=80_000_000,
        messages=4,
        overlap=1.0,
        loading_images_per_second=None,
        gpus_per_node=2,
        links=(Link("gpus", 1000.0, 80.0), Link("nodes", 2000.0, 8.0)),
    )
    return lambda **changes: replace(usual, **changes)
