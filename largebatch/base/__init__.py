"""The ground: errors, numbers, atomic file writes, signal handling, progress bars, exit statuses. No torch."""
