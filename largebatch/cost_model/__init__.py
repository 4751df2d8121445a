"""What an iteration, an epoch and a run take on p GPUs over m nodes: from a machine's profile, without the machine."""
