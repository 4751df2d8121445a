"""Starting runs: one run, a sweep on this machine, SLURM arrays. No Hydra."""
