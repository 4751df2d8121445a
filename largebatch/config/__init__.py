"""The configuration of a run: frozen dataclasses that check plain values. No torch, no Hydra."""
