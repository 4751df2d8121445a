"""What recorded runs say: selection, statistics, tables and figures. Reads records, never a model."""
