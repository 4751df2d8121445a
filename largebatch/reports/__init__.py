"""Report recorded runs: selection, statistics, tables and figures. Reads records, never a model."""
