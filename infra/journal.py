"""The metrics of a run: the file `metrics.jsonl` of its directory, and the sending of it to MLflow.

One JSON object per line, `{"step": 12, "time": 1790000000.125, "loss": 2.31}`: a strictly rising
step, seconds since the epoch, then the metrics of that step. JSON cannot express non-finite
numbers, so they are written as the strings "NaN", "Infinity" and "-Infinity".

Every metric is written to the file first. A `Logger` sends the file on from a thread of its own,
so a server that is slow or away never slows training.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import documents
from infra.credentials import scrub
from infra.errors import DataError, Problem
from infra.storage import Folder, explained

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from infra.tracking import RunHandle

NAME = "metrics.jsonl"
CLOCK = ("step", "time")  # of a line; every other key is a metric
# What MLflow accepts on every platform; it refuses the whole batch for one bad name.
METRIC = re.compile(r"[\w./ -]{1,250}")
LONGEST_WAIT_S = 60.0  # between two attempts to reach a server that is away
UPLOAD_EVERY_S = 30.0  # the whole journal each time, where it lives in an object store
LINES_A_BATCH = 100
METRICS_A_BATCH = 1000  # MLflow's limit

log = logging.getLogger(__name__)


class Journal:
    """The metrics file, written line by line by rank 0.

    `resume=s` keeps the lines of steps <= s: the run continues from the checkpoint of step s and
    repeats the later steps. None starts an empty journal. A last line that is torn is dropped;
    any other unreadable line is a DataError that names it.

    An object store cannot append. There the lines gather in a temporary file, which `sync` uploads
    whole. Call it before committing a checkpoint, so that the store holds every line up to the
    checkpoint's step. `permit` is called before each upload; it raises if this process may no
    longer write the run.
    """

    def __init__(
        self,
        folder: str | Folder,
        *,
        resume: int | None = None,
        permit: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self._permit = Folder.at(folder), permit
        self._spool = None if self.folder.is_local else tempfile.TemporaryDirectory()
        self.local = Path(self._spool.name if self._spool else self.folder.path) / NAME
        kept = [] if resume is None else [row for row in read(self.folder) if row["step"] <= resume]
        self._last = kept[-1]["step"] if kept else -1
        Folder.at(str(self.local.parent)).write_bytes(NAME, b"".join(map(_encode, kept)))
        with explained(str(self.local)):
            # Unbuffered: one line is one system call, which a SIGKILL cannot cut in two.
            self._file = self.local.open("ab", buffering=0)
        self._uploaded, self._uploaded_at = -1, -math.inf
        self._uploading = threading.Lock()  # an older upload must not end after a newer one

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line; it has reached the operating system on return.

        Raises ValueError for a step that is not above the last one or for a name that MLflow would
        refuse, and InfraError where the disk refuses.
        """
        if step <= self._last:
            raise ValueError(f"step {step} follows step {self._last}; steps must rise")
        for name in metrics:
            if name in CLOCK or not METRIC.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a metric; use letters, digits and _ . / -")
        values = {name: float(value) for name, value in metrics.items()}
        line = _encode({"step": step, "time": round(time.time(), 3), **values})
        with explained(str(self.local)):
            if self._file.write(line) < len(line):  # a disk that fills up takes a part of it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._last = step

    def sync(self, every: float = 0.0) -> None:
        """Upload the journal to its object store; on a disk it is there already.

        Does nothing if the store has every line, or if the last upload was less than `every`
        seconds ago. Raises InfraError where the store refuses, and what `permit` raises.
        """
        with self._uploading:
            size, now = self.local.stat().st_size, time.monotonic()
            if self._spool and size != self._uploaded and now >= self._uploaded_at + every:
                self._permit()
                self.folder.write_bytes(NAME, self.local.read_bytes())
                self._uploaded, self._uploaded_at = size, now

    def close(self) -> None:
        """Upload what is left and close the file."""
        try:
            self.sync()
        finally:
            self._file.close()
            if self._spool:
                self._spool.cleanup()


def read(folder: str | Folder) -> list[dict[str, float]]:
    """The lines of a run directory's journal, non-finite values as floats; [] if there is none."""
    folder = Folder.at(folder)
    if not folder.exists(NAME):
        return []
    return [row for row, _ in parse(folder.read_bytes(NAME), folder.url_of(NAME))]


def parse(content: bytes, where: str) -> Iterator[tuple[dict[str, float], int]]:
    """Each line's values, and the offset at which the line ends; a torn last line is skipped.

    Raises DataError for any other line that is not one of a journal.
    """
    end, last = 0, -1
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        end += len(line)
        try:
            row = _decode(line)
            if row["step"] <= last:
                raise ValueError("steps must rise")
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
            if end == len(content) and not line.endswith(b"\n"):
                return
            fix = "Remove that line, or take the journal from another copy"
            raise DataError(f"{where}, line {number}", "not a line of a journal", fix) from None
        last = row["step"]
        yield row, end


def _decode(line: bytes) -> dict[str, float]:
    values = documents.from_json(line)
    step, seconds = (values.pop(name) for name in CLOCK)
    if type(step) is not int or not all(METRIC.fullmatch(name) for name in values):
        raise ValueError("bad step, or bad name of a metric")
    return {"step": step, "time": float(seconds)} | {k: float(v) for k, v in values.items()}


def _encode(row: Mapping[str, float]) -> bytes:
    plain = {k: v if math.isfinite(v) else json.dumps(v) for k, v in row.items()}
    return json.dumps(plain).encode() + b"\n"


class Logger:
    """Writes metrics to the journal at once and sends them to MLflow when it can.

    A thread sends every `interval` seconds what the journal holds and the server lacks, less often
    while the server is away. No failure of MLflow or of an upload reaches the caller. The first
    failure of a series is logged as a warning.
    """

    def __init__(self, journal: Journal, handle: RunHandle, *, interval: float = 2.0) -> None:
        self._journal = journal
        self._sender = Sender(handle) if handle.run_id else None
        self._where = f"{handle.folder} -> {handle.uri}"
        self._interval = interval
        self._failing = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step; steps rise strictly (see `Journal.append`)."""
        self._journal.append(step, metrics)

    def sync(self) -> None:
        """Upload every line so far to the run's store: called before a checkpoint is committed.
        A store that refuses is logged as a warning."""
        try:
            self._journal.sync()
        except Problem as problem:
            log.warning("%s", problem)

    def close(self, patience: float = 15.0) -> int:
        """Send what is left for at most `patience` seconds; the number of lines left unsent.

        Those lines stay in the journal, and `tracking.finish` or `replay` sends them.
        """
        self._closing.set()
        self._thread.join(patience)
        sent = self._sender.offset if self._sender else 0
        unsent = self._journal.local.read_bytes()[sent:].count(b"\n")
        try:
            self._journal.close()
        except Problem as problem:
            log.warning("%s", problem)
        return unsent

    def _run(self) -> None:
        wait = self._interval
        while not self._closing.wait(wait):
            wait = self._interval if self._send() else min(2 * wait, LONGEST_WAIT_S)
        self._send()

    def _send(self) -> bool:
        try:
            self._journal.sync(every=UPLOAD_EVERY_S)
            if self._sender:
                with self._journal.local.open("rb") as file:
                    file.seek(self._sender.offset)
                    self._sender.send(file.read(), str(self._journal.local))
        except Exception as error:  # by the promise of this class, no caller sees it
            if not self._failing:
                text = "%s: %s. Metrics are safe in the journal and are sent when it works again"
                log.warning(text, self._where, reason(error))
            self._failing = True
            return False
        if self._failing:
            log.warning("%s: works again, nothing is missing", self._where)
        self._failing = False
        return True


class Sender:
    """Sends journal lines to one run so that the server holds each (metric, step) once.

    A killed process may have sent lines that its successor does not know of, and a resumed run
    repeats steps. So the server is asked once per metric for its highest step, and lines up to
    that step are skipped. After a failure it is asked again: the batch may have arrived although
    its answer was lost.
    """

    def __init__(self, handle: RunHandle) -> None:
        assert handle.run_id is not None
        self.offset = 0  # bytes of the journal that the server has
        self._handle, self._run_id = handle, handle.run_id
        self._highest: dict[str, int] = {}

    def send(self, lines: bytes, where: str) -> None:
        """Send the lines that follow `offset`, which advances with every batch that is taken."""
        from mlflow.entities import Metric

        client = self._handle.connect()
        start, rows = self.offset, parse(lines, where)
        try:
            while batch := list(islice(rows, LINES_A_BATCH)):
                metrics = [
                    Metric(name, value, round(1000 * row["time"]), row["step"])
                    for row, _ in batch
                    for name, value in row.items()
                    if name not in CLOCK and row["step"] > self._known(client, name)
                ]
                for part in batches(metrics, METRICS_A_BATCH):
                    client.log_batch(self._run_id, metrics=part)
                self.offset = start + batch[-1][1]
        except Exception:
            self._highest.clear()
            raise

    def _known(self, client: MlflowClient, name: str) -> int:
        if name not in self._highest:
            history = client.get_metric_history(self._run_id, name)
            self._highest[name] = max((metric.step for metric in history), default=-1)
        return self._highest[name]


def reason(error: Exception) -> str:
    """Why MLflow failed, on one short line without credentials."""
    if isinstance(error.__context__, OSError):  # all of requests' errors are
        return f"no answer, {type(error.__context__).__name__}"
    lines = scrub(str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
