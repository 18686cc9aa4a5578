"""The command line of every verb: its flags, its last line of output, its exit code."""

from __future__ import annotations

import errno
import json
import math
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from infra import config, console
from infra.credentials import refuse_credentials, scrub
from infra.errors import ConfigError, InfraError, Problem, causes, nearest
from infra.preemption import Terminated, terminable

T = TypeVar("T")

FLAGS = {
    "--help": "show this",
    "--print-config": "print the resolved configuration as a preset",
    "--dry-run": "print the plan and touch nothing",
    "--traceback": "show where an error came from",
}
# Classes of Python, torch and Ray, by name: neither library is to be imported for them.
OUT_OF_MEMORY = {"MemoryError", "OutOfMemoryError"}
BUG = 1
INTERRUPTED, TERMINATED = 130, 143  # as shells count the signals that end a process
LONGEST = 2_000  # characters of a message
# Errors of the operating system that are not bugs, and what to do about each.
MACHINE = {
    errno.ENOSPC: "free some space, then run the same command again to resume",
    errno.EDQUOT: "free some space, then run the same command again to resume",
    errno.EACCES: "choose another folder or ask for the right to it",
    errno.EPERM: "choose another folder or ask for the right to it",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EPIPE: "keep what reads the output (or the server) open, then run the same command again",
}


def run(
    verb: str,
    config_type: type[T],
    *,
    plan: Callable[[T], dict[str, Any]],
    execute: Callable[[T], dict[str, Any]],
    presets: Path,
    doc: str,
    verbs: Sequence[str] | None = None,
    argv: Sequence[str] | None = None,
    data_errors: tuple[type[Exception], ...] = (),
) -> int:
    """Run one verb from its command line and return the exit code.

    `plan` says what would be done, `execute` does it; the last line of stdout is what either
    returned, as one JSON object. `verbs`: the sections that a preset may have, any by
    default. Exceptions of the types `data_errors` count as bad data.
    Exit codes: 0 done, 2 configuration, 3 data or weights, 4 infrastructure, 130 interrupted,
    143 terminated, 1 a bug, whose traceback is printed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = {argument for argument in arguments if argument.startswith("-")}
    try:
        _check(flags)
        if "--help" in flags or "-h" in flags:
            sys.stdout.write(_help(verb, config_type, presets, doc))
            return 0
        given = [argument for argument in arguments if argument not in flags]
        settings = config.load(config_type, verb=verb, argv=given, presets=presets, verbs=verbs)
        for key, value in config.flatten(settings).items():
            refuse_credentials(str(value), key)
        if "--print-config" in flags:
            sys.stdout.write(config.to_yaml(settings, verb))
            return 0
        if "--dry-run" in flags:
            result = plan(settings)
            sys.stdout.write(_table(result.items()))
        else:
            with terminable(), console.kept(verb):
                result = execute(settings)
        sys.stdout.write(json.dumps(_json(result), default=str) + "\n")
        sys.stdout.flush()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, code = explain(error, data_errors)
        if "--traceback" in flags or code == BUG:
            sys.stderr.write(scrub(traceback.format_exc()))
        sys.stderr.write(f"{_legible(scrub(message))}\n")
        return code


def explain(error: BaseException, data_errors: tuple[type[Exception], ...] = ()) -> tuple[str, int]:
    """(one message, exit code) for an error, even if Ray has wrapped others around it."""
    found = list(causes(error))
    for cause in found:
        if isinstance(cause, Problem):
            return str(cause), cause.exit_code
        if isinstance(cause, data_errors):
            return str(cause), 3
        if isinstance(cause, Terminated):
            return "ended by SIGTERM; run the same command again to resume", TERMINATED
        if isinstance(cause, KeyboardInterrupt):
            return "interrupted; run the same command again to resume", INTERRUPTED
        if OUT_OF_MEMORY & {kind.__name__ for kind in type(cause).__mro__}:
            why = str(cause).partition("\n")[0] or "there is not enough"
            fix = "Ask for fewer rows at a time"
            return str(InfraError("memory", why, fix)), InfraError.exit_code
        if isinstance(cause, OSError) and cause.errno in MACHINE:
            where, why = str(cause.filename or "the machine"), cause.strerror or str(cause)
            return str(InfraError(where, why, MACHINE[cause.errno])), InfraError.exit_code
    bug = found[0]
    return f"{type(bug).__name__}: {bug} (a bug: see the traceback)", BUG


def _legible(message: str) -> str:
    """A printable message of bounded length: it may quote arbitrary content of a file."""
    if len(message) > LONGEST:
        message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"
    return message.encode(errors="backslashreplace").decode()


def _check(flags: set[str]) -> None:
    for flag in sorted(flags - {*FLAGS, "-h"}):
        close = nearest(flag, FLAGS)
        fix = f"Did you mean {close}?" if close else f"Known: {', '.join(FLAGS)}"
        raise ConfigError(flag, "no such flag", fix)


def _help(verb: str, config_type: type[Any], presets: Path, doc: str) -> str:
    # Kinds of a union may share a key: each has a line of its own.
    fields = [(key, f"{spelt} = {value}") for key, spelt, value in config.describe(config_type)]
    names = config.offered(verb, presets)
    known = f"one of {', '.join(names)}, " if names else ""
    return (
        f"{doc.strip()}\n\n"
        f"arguments: [PRESET] [key.sub=value …]; PRESET is {known}a .yaml or a URL\n\n"
        f"{_table(FLAGS.items())}\n{_table(fields)}"
    )


def _table(rows: Collection[tuple[str, Any]]) -> str:
    width = max((len(key) for key, _ in rows), default=0)
    return "".join(f"{key:<{width}}  {_cell(value)}\n" for key, value in rows)


def _cell(value: Any) -> str:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:,}" if numeric else str(value)


def _json(value: Any) -> Any:
    """A value as JSON: a number that is not finite is written as null."""
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
