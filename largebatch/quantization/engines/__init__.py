"""What computes a network in integers, each on its own hardware."""
