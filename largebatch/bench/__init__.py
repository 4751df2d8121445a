"""Measure the speed of a run's parts on this machine against plain PyTorch: ratios with intervals."""
