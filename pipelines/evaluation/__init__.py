"""What `evaluate` does with a model: stages, metrics, tables, and the gate to `champion`."""
