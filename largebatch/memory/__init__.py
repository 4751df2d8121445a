"""Evaluation in less device memory: weights that live on the CPU and visit the device for their own computation."""

from largebatch.memory.context import MODES, each, offload
from largebatch.memory.fold import fold_batchnorm
from largebatch.memory.groups import GROUPS
from largebatch.memory.statistics import Statistics

__all__ = ["GROUPS", "MODES", "Statistics", "each", "fold_batchnorm", "offload"]
