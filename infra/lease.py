"""The right to write a run directory, or a manifest of shards: one process holds it at a time, on a
disk or in a store.

    runs/.small.lease/000001.json    beside runs/small, while a process writes there

The file is created by a write that fails if the file exists (an exclusive open, a conditional PUT),
and its holder rewrites it every few seconds. Clocks of two machines are never compared: a holder on
another machine counts as dead if its file did not change while it was watched, and one on this
machine as soon as its process is gone. The process that takes over creates the file with the next
number, which again only one process can. A holder that was suspended meanwhile finds a higher
number than its own, and stops.

In a store without conditional writes the last writer wins; every writer checks again a moment
later, and before each commit.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra import cluster, process
from infra.errors import DataError, InfraError, Problem
from infra.storage import Folder, explained
from infra.threads import repeated

BEAT_S = 10.0  # between two writes of the holder
PATIENCE_S = 60.0  # how long a file must not change for its holder to count as dead
LOOK_S = 1.0
SETTLE_S = 1.0  # within which a competing write of the same moment has reached an object store

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right of a process and its workers to write into `run`; it can be pickled and sent to
    them."""

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
        """Raise InfraError if another process has taken the run over; then nothing may be written.

        If the store does not answer, nothing is raised: a write to it would fail by itself.
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


@contextmanager
def held(run: Folder) -> Iterator[Lease]:
    """The right to write into `run`, for the duration of the block, in which a thread renews it.

    Raises InfraError if another process has it. If that process is on another machine, it takes up
    to `PATIENCE_S` to find out whether it is alive.
    """
    lease, content = _take(run)
    try:
        with repeated(lambda: _renew(lease, content), BEAT_S, "lease"):
            yield lease
    finally:
        with suppress(Problem):
            lease.folder.remove(lease.name)
        if lease.folder.is_local:
            with suppress(OSError):  # another process has made its lease there
                os.rmdir(lease.folder.path)


def _renew(lease: Lease, content: dict[str, Any]) -> bool:
    """Count the beat of a lease up in its file; True, and no more, if the lease is lost."""
    try:
        lease.confirm()
    except InfraError as problem:
        log.error("%s", problem)
        return True
    content["beat"] += 1
    with suppress(Problem):  # a store may be away for a while
        lease.folder.write_bytes(lease.name, _encode(content))
    return False


def _take(run: Folder) -> tuple[Lease, dict[str, Any]]:
    """A new lease and the content of its file."""
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
            "started": process.started(os.getpid()),
            "job": job,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "beat": 0,
        }
        if not _create(folder, lease.name, _encode(content)):
            continue
        # Another process may have taken over, and removed the last number, before we listed them.
        if _names(folder)[-1:] != [lease.name]:
            folder.remove(lease.name)
        else:
            for name in names:
                folder.remove(name)
            return lease, content


def _abandoned(run: Folder, name: str) -> bool:
    """Whether the holder of the lease of this name is gone."""
    folder = _folder(run)
    before = _read(folder, name)
    if not before and name not in folder.names():
        return True  # it was released or taken over since it was listed
    if before.get("machine") and before["machine"] == _machine():
        return process.started(before.get("pid")) != before.get("started")
    log.warning(
        "%s is held by %s; waiting %.0f s for a sign of life", run.url, _describe(before),
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
    """Create a file that does not exist; False if another process did first."""
    path = (folder / name).path
    with explained(folder.url_of(name)):
        try:
            if folder.is_local:
                _create_local(Path(path), content)
                return True
            folder.filesystem.pipe_file(path, content, mode="create")
            time.sleep(SETTLE_S)
        except OSError as error:
            if not _is_taken(error):
                raise
            # Perhaps by this very write, whose answer was lost.
    return _encode(_read(folder, name)) == content  # {} if the other process has ended by now


def _is_taken(error: OSError) -> bool:
    """Whether a write failed because its file exists. s3fs raises FileExistsError only where the
    store's answer names the condition that failed, which SeaweedFS's does not."""
    answer = getattr(error.__cause__, "response", {})
    refused = answer.get("Error", {}).get("Code") == "PreconditionFailed"
    return refused or isinstance(error, FileExistsError)


def _create_local(path: Path, content: bytes) -> None:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), path.open("xb") as file:  # another has removed the folder
            try:
                file.write(content)
                file.flush()
            except OSError:  # e.g. a full disk: an empty lease would keep others waiting
                path.unlink()
                raise
            return


def _folder(run: Folder) -> Folder:
    parent, _, name = run.path.rpartition("/")
    return Folder(run.filesystem, f"{parent}/.{name}.lease")


def _names(folder: Folder) -> list[str]:
    """The names of the leases; the last one is valid."""
    return [name for name in folder.names() if re.fullmatch(r"\d{6,}\.json", name)]


def _read(folder: Folder, name: str) -> dict[str, Any]:
    """The content of a lease; {} if it is gone, not a lease, or not completely written yet."""
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
    """An id of this machine, boot and container, within which pids are unique; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
