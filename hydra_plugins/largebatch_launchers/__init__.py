"""Hand the arms of Hydra's sweeps (``-m``) to largebatch. Every Hydra program imports this when it starts: no torch."""
