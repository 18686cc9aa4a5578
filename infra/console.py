"""What a person sees of a long job, on stderr: lines, and one line of progress.

On a terminal the line of progress is rewritten; elsewhere it is printed every few seconds. A
process that Ray has started writes its lines to its own stderr, and `relay` shows them in the
driver without Ray's prefixes. What C++ libraries write to file descriptor 2 is not for a person:
`kept` puts it into a file, which is shown only when something fails.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

EVERY_S = 5.0  # between two lines of progress
LINES = 20  # of the log, shown after a failure
REWRITE = "\r"  # begins a line of progress that another process sends
# A line of Ray's C++ code: [2026-11-25 20:34:07,123 E 423 423] core_worker.cc:42: …
NATIVE = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,.]+ \w \d+ \d+\]")
ENGINE = ("raylet", "autoscaler", "gcs_server")  # Ray's own processes, as it names them
CHATTY = ("alembic.runtime", "mlflow.store.db.utils")  # loggers that tell of MLflow's migrations

T = TypeVar("T")

_open = False  # whether a line of progress stands at the end of the terminal


def say(line: str) -> None:
    """A line for a person; stdout is kept for what was made."""
    global _open
    before = "\r\x1b[K" if _open else ""
    _open = False
    _write(f"{before}{line}\n")


def progress(line: str, *, last: bool = False) -> None:
    """A line of progress, which the next one replaces on a terminal; the last one stays."""
    global _open
    if _sent_through_ray():
        _write(f"{line}\n" if last else f"{REWRITE}{line}\n")
    elif last or not sys.stderr.isatty():
        say(line)
    else:
        _open = True
        cut = line[: shutil.get_terminal_size().columns - 1]
        _write(f"\r\x1b[K{cut}")


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def line(what: str, done: int, of: int, unit: str, *facts: str, rate: str, eta_s: float) -> str:
    """Progress in the manner of all verbs. what: the verb, and what it works on."""
    return "  ".join([what, f"{done:,}/{of:,} {unit}", *facts, rate, f"ETA {clock(eta_s)}"])


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Meter:
    """Progress of work whose parts take about equally long: `done` of `of` units."""

    def __init__(self, what: str, of: int, unit: str) -> None:
        self.what, self.of, self.unit = what, of, unit
        self.began = self.shown = time.monotonic()

    def show(self, done: int, rate: Callable[[float], str] | None = None) -> None:
        """Show it every few seconds, and at the end. rate: from the seconds so far; by default
        units a second."""
        now = time.monotonic()
        if now - self.shown < EVERY_S and done < self.of:
            return
        self.shown, elapsed = now, max(now - self.began, 1e-9)
        speed = rate(elapsed) if rate else f"{done / elapsed:,.1f} {self.unit}/s"
        left = elapsed / max(done, 1) * (self.of - done)
        shown = line(self.what, done, self.of, self.unit, rate=speed, eta_s=left)
        progress(shown, last=done >= self.of)

    def over(self, things: Iterable[T]) -> Iterator[T]:
        """The things, each of them a unit that is done when the next one is asked for."""
        for done, thing in enumerate(things, 1):
            yield thing
            self.show(done)


def relay(data: Mapping[str, Any]) -> None:
    """Show what a process under Ray has written, or keep it where it is Ray's own."""
    for text in data["lines"]:
        with suppress(OSError):  # of a disk that is full: an error would end Ray's own thread
            if data.get("pid") in ENGINE or NATIVE.match(text):
                os.write(2, f"{text}\n".encode())
            elif text.startswith(REWRITE):
                progress(text.removeprefix(REWRITE))
            else:
                say(text)


@contextmanager
def kept(name: str) -> Iterator[Path]:
    """Keep what is written to file descriptor 2 in a file, of which a failure shows the end.

    Python's `sys.stderr` still reaches the terminal. The file goes when the block ends well.
    """
    descriptor, path = tempfile.mkstemp(prefix=f"{name}-", suffix=".log")
    before, log = sys.stderr, Path(path)
    shown = os.dup(2)
    try:
        sys.stderr.flush()
        if _is_descriptor_2(before):
            # Left open for ever: a logger that is made in the block may hold it.
            sys.stderr = os.fdopen(os.dup(shown), "w", buffering=1, errors="backslashreplace")
        os.dup2(descriptor, 2)
        try:
            with _quiet():
                yield log
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            sys.stderr = before
    except Exception:
        _show(log)
        raise
    except BaseException:  # an interrupt: nothing has failed
        log.unlink(missing_ok=True)
        raise
    finally:
        os.close(shown)
        os.close(descriptor)
    log.unlink(missing_ok=True)


def _show(log: Path) -> None:
    lines = log.read_text(errors="backslashreplace").splitlines()
    if not lines:
        log.unlink()
        return
    say("\n".join([f"the last lines of {log}:", *lines[-LINES:]]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Send Python's warnings, and what MLflow logs of its migrations, to descriptor 2."""
    stream = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
    handler = logging.StreamHandler(stream)
    loggers = [logging.getLogger(name) for name in CHATTY]

    def warn(
        message: Warning | str, category: type[Warning], name: str, at: int, *rest: Any
    ) -> None:
        with suppress(OSError):  # of a disk that is full
            stream.write(warnings.formatwarning(message, category, name, at))
            stream.flush()

    with warnings.catch_warnings():
        warnings.showwarning = warn
        for logger in loggers:
            logger.addHandler(handler)
            logger.propagate = False
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
                logger.propagate = True


def _is_descriptor_2(stream: Any) -> bool:
    try:
        return bool(stream.fileno() == 2)
    except (AttributeError, OSError, ValueError):  # a stream that a test has put there
        return False


def _sent_through_ray() -> bool:
    """Whether Ray has started this process, so that the driver shows what it writes."""
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized() and ray.get_runtime_context().get_actor_id())
