"""Images, the order in which workers see them, and what is done to them on the way."""
