"""Training: the loop, the step, gradient exchange, optimizers, checkpoints, validation and probing."""
