"""Training in a process leaves it as it was."""

import logging
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import largebatch
from largebatch.api.unchanged import unchanged
from largebatch.cli.compose import configuration_directory

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def state():
    """Return what a program could notice, read one by one."""
    backends = torch.backends
    return {
        "signals": [signal.getsignal(number) for number in SIGNALS],
        "environment": dict(os.environ),
        "argv": (sys.argv, list(sys.argv)),
        "path": list(sys.path),
        "directory": Path.cwd(),
        "streams": (sys.stdout, sys.stderr),
        "hydra": GlobalHydra.instance().hydra,
        "loggers": [logging.getLogger(name).level for name in (None, "torch.distributed.elastic", "hydra")],
        "handlers": list(logging.getLogger().handlers),
        "threads": torch.get_num_threads(),
        "type": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": (torch.get_deterministic_debug_mode(), backends.cudnn.deterministic, backends.cudnn.benchmark),
        "older switches": (
            *(backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32),
            torch.get_float32_matmul_precision(),
        ),
        "newer switches": [
            one.fp32_precision
            for one in (backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.mkldnn.matmul)
        ],
        "random": random.getstate(),
        "numpy": [part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "group": torch.distributed.is_initialized(),
    }


@pytest.fixture
def unusual():
    """Set all of it to something that no run would choose."""
    with unchanged():
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        os.environ["LARGEBATCH_TEST"] = "1"
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        torch.set_deterministic_debug_mode("warn")
        torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = True
        torch.backends.cuda.matmul.allow_tf32 = True
        random.seed(5)
        np.random.seed(6)
        torch.manual_seed(7)
        yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("unusual")
def test_training_leaves_the_process_as_it_was(tiny, tmp_path):
    with initialize_config_dir(version_base="1.3", config_dir=str(configuration_directory())):
        before = state()
        run = largebatch.train(*tiny, exact=True, iterations=2, run_dir=tmp_path / "run", progress=False)
        after = state()
    for name in before:
        assert after[name] == before[name], name
    assert run.status == "stopped"
    assert run.config.exact


@pytest.mark.usefixtures("unusual")
def test_a_mistake_leaves_the_process_as_it_was(tiny):
    before = state()
    with pytest.raises(largebatch.UserError):
        largebatch.train(*tiny, n=99, run_dir="nowhere")
    with pytest.raises(largebatch.UserError):
        largebatch.train(*tiny, kk=1)
    assert state() == before


@pytest.mark.usefixtures("unusual")
def test_other_calls_leave_the_process_as_it_was(trained):
    before = state()
    model = largebatch.load_model(trained)
    images, _ = largebatch.load_images(trained, "training", 16)
    largebatch.quantize(model, images)
    largebatch.explain(k=2)
    after = state()
    for name in before:
        assert after[name] == before[name], name
    assert images.dtype == torch.float32


def test_who_uses_the_newer_switches_alone_is_understood():
    with unchanged():
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        with unchanged():
            torch.backends.cuda.matmul.allow_tf32 = False
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"


def test_inside_the_default_device_and_type_are_pytorchs():
    with torch.device("meta"), unchanged():
        assert torch.zeros(1).device.type == "cpu"
    assert torch.get_default_device().type == "cpu"
