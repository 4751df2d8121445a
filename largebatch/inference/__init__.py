"""Evaluate recorded runs, ensembles of them, and weights from files, also where they do not fit on the device."""
