"""What a person sees of a long job, and what is kept from the terminal until something fails."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra import console
from infra.console import Meter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """In the place of stderr; not as a fixture, because pytest replaces stderr after those."""
    monkeypatch.setattr(console, "_open", False)
    monkeypatch.setattr(console, "_sent_through_ray", lambda: False)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_progress_is_rewritten_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    console.progress("1/3")
    console.progress("2/3")
    console.say("a warning")
    console.progress("3/3", last=True)
    erase = "\r\x1b[K"
    assert screen.getvalue() == f"{erase}1/3{erase}2/3{erase}a warning\n3/3\n"


def test_a_line_of_progress_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "10")
    console.progress("0123456789abc")
    assert screen.getvalue().endswith("012345678")


def test_progress_is_printed_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    console.progress("1/3")
    assert capsys.readouterr().err == "1/3\n"


def test_a_meter_speaks_every_few_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Meter("evaluate texts", 4, "parts")
    for done in (1, 2, 3, 4):
        now[0] += 4
        meter.show(done, (lambda elapsed: f"{elapsed:g} s") if done == 4 else None)
    assert capsys.readouterr().err.splitlines() == [
        "evaluate texts  2/4 parts  0.2 parts/s  ETA 0:08",
        "evaluate texts  4/4 parts  16 s  ETA 0:00",
    ]


def test_lines_of_workers_are_shown_and_those_of_ray_are_kept(
    capfd: pytest.CaptureFixture[str],
) -> None:
    native = "[2026-11-25 20:34:07,123 E 423 423] core_worker.cc:42: lost"

    def fail() -> None:
        console.relay({"pid": 7, "lines": ["a warning", native, "\rstep 1/2"]})
        console.relay({"pid": "raylet", "lines": ["no room"]})
        assert capfd.readouterr().err == "a warning\nstep 1/2\n"
        raise RuntimeError

    with pytest.raises(RuntimeError), console.kept("test"):
        fail()
    log, *lines = capfd.readouterr().err.splitlines()
    assert lines == [native, "no room"]
    Path(log.removeprefix("the last lines of ").removesuffix(":")).unlink()


def test_a_full_disk_does_not_end_the_thread_that_relays(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(
        sys, "stderr", SimpleNamespace(isatty=lambda: False, write=full, flush=full)
    )
    console.relay({"pid": "raylet", "lines": ["no room", "none at all"]})
    console.relay({"pid": 7, "lines": ["a line", "\rstep 1/2"]})


def test_the_log_goes_where_all_ends_well(capfd: pytest.CaptureFixture[str]) -> None:
    with console.kept("test") as log:
        os.write(2, b"from a library\n")
        logging.getLogger("alembic.runtime.migration").warning("a migration")
        warnings.warn("out of date", UserWarning, stacklevel=1)
        warnings.warn("no character: \udce9", UserWarning, stacklevel=1)
        kept = log.read_text()
        assert all(text in kept for text in ("from a library", "a migration", "out of date"))
    assert not log.exists()
    assert capfd.readouterr().err == ""
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "afterwards\n"


def test_an_error_before_any_chatter_shows_no_log(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), console.kept("test") as log:
        raise RuntimeError
    assert not log.exists()
    assert capfd.readouterr().err == ""


def test_an_interrupt_leaves_no_log(capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        os.write(2, b"from a library\n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), console.kept("test") as log:
        interrupt()
    assert not log.exists()
    assert capfd.readouterr().err == ""


def test_stderr_reaches_the_terminal_of_a_real_process() -> None:
    program = (
        "import os, sys\nfrom infra import console\n"
        "with console.kept('test'):\n"
        "    os.write(2, b'hidden\\n'); print('shown', file=sys.stderr); console.say('said')\n"
        "print('after', file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "shown\nsaid\nafter\n")
