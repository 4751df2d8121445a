"""Starting the processes of a run. What they do is given by the caller."""

from largebatch.launch.local import RankError, Stopped, launch

__all__ = ["RankError", "Stopped", "launch"]
