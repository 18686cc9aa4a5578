"""What `evaluate` does: questions about models, the engine that asks them, the report, and the gate
to `champion`."""
