"""Honest, reproducible large-minibatch training."""
