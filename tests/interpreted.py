"""Marks of tests whose kernels Triton's interpreter runs where there is no GPU."""

from importlib import metadata

import numpy as np
import pytest
import torch


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


# PyTorch 2.11 comes with a Triton whose interpreter makes numbers of arrays with an axis, as NumPy allowed until 2.4.
_OLD = _version(metadata.version("triton")) < (3, 7)
MARKS = [
    pytest.mark.skipif(
        _OLD and not torch.cuda.is_available() and _version(np.__version__) >= (2, 4),
        reason="the interpreter of Triton 3.6 takes NumPy below 2.4",
    ),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
