"""The right to write into a run directory: one process has it at a time, whatever the store.

    runs/.small.lease/000001.json    beside runs/small, for as long as somebody writes there

The file is made by a write that fails where the file is there already (an exclusive open, a
conditional PUT), and its holder rewrites it every few seconds. No two clocks are ever compared: a
holder on another machine is given up when its file has not changed while one watched, and one on
this machine as soon as its process is gone. Whoever takes over makes the file of the next number,
which again only one can; a holder that wakes up after that finds its own number passed.

A store without conditional writes lets the last writer win; every writer looks again a moment
later, and again before whatever it commits.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra import cluster
from infra.errors import DataError, InfraError, Problem
from infra.storage import Folder, explained

BEAT_S = 10.0  # between two signs of life
PATIENCE_S = 60.0  # how long a file must stand still for its holder to be given up
LOOK_S = 1.0
SETTLE_S = 1.0  # within which a rival write of the same moment has arrived in an object store

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A lease as its workers know it; pickles, so it travels to them."""

    run: Folder
    number: int
    holder: str

    @property
    def folder(self) -> Folder:
        return _folder(self.run)

    @property
    def name(self) -> str:
        return f"{self.number:06d}.json"

    def confirm(self) -> None:
        """InfraError where another process has taken the run over: nothing may be written then.

        Where the store does not answer, nothing is raised: a write would fail there as well.
        """
        try:
            names = _names(self.folder)
            latest = _read(self.folder, names[-1]) if names else {}
        except InfraError:
            return
        if latest.get("holder") != self.holder:
            now = _describe(latest) if latest else "a process that has ended"
            raise InfraError(
                self.run.url,
                f"this process stood still, and the run was taken over by {now}",
                "Let that one go on; the same command resumes the run when it has ended",
            )


class Held:
    """A lease in the hands of its holder, which gives signs of life until it is released."""

    def __init__(self, lease: Lease, content: dict[str, Any]) -> None:
        self.lease = lease
        self._content = content
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @property
    def run(self) -> Folder:
        """The run directory."""
        return self.lease.run

    def release(self) -> None:
        """Let the next one in."""
        self._released.set()
        self._thread.join()
        with suppress(Problem):
            self.lease.folder.remove(self.lease.name)
        if self.lease.folder.is_local:
            with suppress(OSError):  # somebody else is in there
                os.rmdir(self.lease.folder.path)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                self.lease.confirm()
            except InfraError as problem:
                log.error("%s", problem)
                return
            self._content["beat"] += 1
            with suppress(Problem):  # a store may be away for a while
                self.lease.folder.write_bytes(self.lease.name, _encode(self._content))


@contextmanager
def held(run: Folder) -> Iterator[Held]:
    """The right to write into `run`, for the duration.

    Raises InfraError where another process has it. Where its holder is on another machine, it
    takes up to `PATIENCE_S` to find out whether that lives.
    """
    taken = _take(run)
    try:
        yield taken
    finally:
        taken.release()


def _take(run: Folder) -> Held:
    folder, job = _folder(run), cluster.job_id()
    while True:
        names = _names(folder)
        if names and not _abandoned(run, names[-1]):
            raise InfraError(
                run.url,
                f"is being written by {_describe(_read(folder, names[-1]))}",
                "Wait for it, stop it, or choose another name",
            )
        number = int(names[-1].removesuffix(".json")) + 1 if names else 1
        lease = Lease(run=run, number=number, holder=uuid.uuid4().hex)
        content = {
            "holder": lease.holder,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "job": job,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "beat": 0,
        }
        if not _create(folder, lease.name, _encode(content)):
            continue
        # Seen too late: who has followed before has removed the last number, whose turn it was.
        if _names(folder)[-1] != lease.name:
            folder.remove(lease.name)
        else:
            for name in names:
                folder.remove(name)
            return Held(lease, content)


def _abandoned(run: Folder, name: str) -> bool:
    """Whether nobody holds the lease of this name any more."""
    folder = _folder(run)
    before = _read(folder, name)
    if not before and name not in folder.names():
        return True  # it was released, or followed, since it was seen
    if before.get("machine") and before["machine"] == _machine():
        return _started(before.get("pid")) != before.get("started")
    log.warning(
        "%s is held by %s; looking for %.0f s whether that lives", run.url, _describe(before),
        PATIENCE_S,
    )  # fmt: skip
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        time.sleep(LOOK_S)
        now = _read(folder, name)
        if now != before:
            return not now  # it has been released
    return True


def _create(folder: Folder, name: str, content: bytes) -> bool:
    """Make a file that is not there yet; False where somebody else was first."""
    path = (folder / name).path
    with explained(folder.url_of(name)):
        try:
            if folder.is_local:
                _create_local(Path(path), content)
                return True
            folder.filesystem.pipe_file(path, content, mode="create")
            time.sleep(SETTLE_S)
        except FileExistsError:
            pass  # perhaps by this very write, whose answer was lost
    return folder.read_bytes(name) == content


def _create_local(path: Path, content: bytes) -> None:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), path.open("xb") as file:  # a rival tidied up just now
            file.write(content)
            return


def _folder(run: Folder) -> Folder:
    parent, _, name = run.path.rpartition("/")
    return Folder(run.filesystem, f"{parent}/.{name}.lease")


def _names(folder: Folder) -> list[str]:
    """The leases that there are, the one that counts at the end."""
    return [name for name in folder.names() if re.fullmatch(r"\d{6,}\.json", name)]


def _read(folder: Folder, name: str) -> dict[str, Any]:
    """What a lease says; nothing where it is gone, no lease, or being made just now."""
    try:
        content = json.loads(folder.read_bytes(name))
    except (DataError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _encode(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _describe(content: dict[str, Any]) -> str:
    if not content:
        return "another process"
    pid, host, since, job = (content.get(key) for key in ("pid", "host", "since", "job"))
    return f"process {pid} on {host}{f', Ray job {job}' if job else ''}, since {since}"


def _machine() -> str | None:
    """What tells apart the machines, their boots and their containers, within each of which a
    process has one number; None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: object) -> str | None:
    """When a process of this machine was started, in its own unit; None if it is gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
