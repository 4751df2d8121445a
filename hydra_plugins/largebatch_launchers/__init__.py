"""How Hydra's sweeps (``-m``) start their arms. Every start of every Hydra program imports this: no torch."""
