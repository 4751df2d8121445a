"""Starting the processes of a run. What they do is given by the caller."""

from largebatch.launch.local import RankError, RankLost, Stopped, launch

__all__ = ["RankError", "RankLost", "Stopped", "launch"]
