"""Evaluation in less device memory: weights that live on the CPU and visit the device for their own computation."""

from largebatch.offloading.context import MODES, each, offload
from largebatch.offloading.fold import fold_batchnorm
from largebatch.offloading.groups import GROUPS
from largebatch.offloading.statistics import Statistics

__all__ = ["GROUPS", "MODES", "Statistics", "each", "fold_batchnorm", "offload"]
