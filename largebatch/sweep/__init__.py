"""Sweeps: many runs planned in one manifest, and what became of each. No torch, no Hydra."""
