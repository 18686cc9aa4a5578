"""The three ways a run can fail other than by a bug, each with its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

# The attributes in which Ray's errors keep the error that they report.
WRAPPERS = ("cause", "health_check_failure", "controller_failure")


class Problem(Exception):
    """One message to the user: where it went wrong, why, and what to do about it.

    Problems are sent between processes (a worker raises, the driver reports), so they are pickled
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
    """The given data or weights are wrong or damaged."""

    exit_code = 3


class InfraError(Problem):
    """The machine, the cluster, the network or a store fails."""

    exit_code = 4


class PeerLost(InfraError):
    """Another process of a group has gone, which is all that this one knows of it."""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate closest in spelling to `name`, or None if none is close."""
    return next(iter(difflib.get_close_matches(name, list(candidates), n=1)), None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, outermost first, without the wrappers of a cluster.

    Ray puts what a task raised under `cause`, and what train workers raised under
    `worker_failures` by rank. Such a wrapper says nothing of its own: the text of one is a
    whole remote traceback, even where it poses as an instance of what it wraps.
    """
    left, seen = [error], set[int]()
    while left:
        error = left.pop(0)
        # A problem that is raised again from its wrapper is the cause of its own cause.
        if id(error) in seen:
            continue
        seen.add(id(error))
        failures = getattr(error, "worker_failures", None) or {}
        wrapped = [*(getattr(error, name, None) for name in WRAPPERS), *failures.values()]
        inner = [cause for cause in wrapped if isinstance(cause, BaseException)]
        if not inner:
            yield error
            inner = [error.__cause__] if error.__cause__ else []
        left = inner + left
