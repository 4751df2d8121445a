"""Evaluation in less device memory: weights that live on the CPU and visit the device for their own computation."""

from largebatch.memory.context import MODES, Statistics, offload
from largebatch.memory.groups import GROUPS

__all__ = ["GROUPS", "MODES", "Statistics", "offload"]
