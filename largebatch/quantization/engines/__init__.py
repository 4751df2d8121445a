"""Engines that compute an integer network, each on its own hardware."""
