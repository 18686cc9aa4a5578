"""The three ways a run can fail through no fault of its code, each with its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Problem(Exception):
    """One message to the user: where it went wrong, why, and what to do about it.

    Problems cross process boundaries (a worker raises, the driver reports), so they pickle
    by their parts rather than by the formatted message.
    """

    exit_code = 1

    def __init__(self, where: str, why: str, fix: str = "") -> None:
        super().__init__(f"{where}: {why}" + (f". {fix}" if fix else ""))
        self.where, self.why, self.fix = where, why, fix

    def __reduce__(self) -> tuple[type[Problem], tuple[str, str, str]]:
        return type(self), (self.where, self.why, self.fix)


class ConfigError(Problem):
    """The configuration or the command line is wrong."""

    exit_code = 2


class DataError(Problem):
    """The data or the weights given are not what they should be."""

    exit_code = 3


class InfraError(Problem):
    """The machine, the cluster, the network or a store does not do its part."""

    exit_code = 4


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate closest in spelling to `name`, or None where none is close."""
    return next(iter(difflib.get_close_matches(name, list(candidates), n=1)), None)
