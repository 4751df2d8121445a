"""Networks by name, with the paper's initialisation."""

from largebatch.models.build import build_model, initialise, is_stochastic, wants_paper_init
from largebatch.models.resnet import SmallResNet

__all__ = ["SmallResNet", "build_model", "initialise", "is_stochastic", "wants_paper_init"]
