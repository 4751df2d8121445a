"""Run directories: writing, reading, provenance. No torch."""
