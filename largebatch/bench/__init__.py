"""How fast this machine is at a run's parts, beside plain PyTorch: ratios with spread, measured in one go."""
