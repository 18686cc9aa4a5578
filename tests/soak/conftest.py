"""The table at the end is that of `tests/faults`."""

from tests.faults.conftest import cost, pytest_terminal_summary

__all__ = ["cost", "pytest_terminal_summary"]
