"""What `sweep` is made of."""
