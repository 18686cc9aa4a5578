"""The parts of a model for strangers: its one file of code, its card, and how it is pushed."""
