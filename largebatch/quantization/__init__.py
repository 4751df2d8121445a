"""Networks in 8-bit integers: from a trained network to its integers, on several engines, and what it costs."""
