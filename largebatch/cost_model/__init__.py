"""Predict the time of an iteration, an epoch and a run on p GPUs over m nodes from a machine's profile."""
