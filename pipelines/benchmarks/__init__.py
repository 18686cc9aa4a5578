"""What `benchmark` times: one module for each of `settings.Name`, and what they share."""
