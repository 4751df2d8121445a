"""Processes: placement on devices, ranks, the watchdog and the lock of a run directory."""
