"""The journal: `metrics.jsonl` of a run directory, which hears of every metric before MLflow does.

One JSON object per line, `{"step": 12, "time": 1790000000.125, "loss": 2.31}`: a step in
strictly rising order, seconds since the epoch, then the metrics of that step. JSON has no word
for the non-finite numbers, so they stand as the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from infra import documents
from infra.errors import DataError
from infra.storage import Folder, explained

NAME = "metrics.jsonl"
CLOCK = ("step", "time")  # of a line; whatever else it holds is a metric
# What MLflow accepts on every platform; one bad name would have a whole batch refused.
METRIC = re.compile(r"[\w./ -]{1,250}")


class Journal:
    """Rank 0's metrics, on the disk line by line.

    `resume=s` keeps the lines of steps <= s, as the checkpoint of step s is about to be continued
    and the later ones will be redone; None starts an empty journal. Either way a last line torn by
    a power cut goes; any other unreadable line is a DataError that names it.

    In an object store, which cannot append, the lines gather in a temporary file that `sync`
    uploads whole: call it before committing a checkpoint, so that no line at or below a
    checkpoint's step can be lost with the machine.
    """

    def __init__(self, folder: str | Folder, *, resume: int | None = None) -> None:
        self.folder = Folder.at(folder)
        self._spool = None if self.folder.is_local else tempfile.TemporaryDirectory()
        self.local = Path(self._spool.name if self._spool else self.folder.path) / NAME
        kept = [] if resume is None else [row for row in read(self.folder) if row["step"] <= resume]
        self._last = kept[-1]["step"] if kept else -1
        Folder.at(str(self.local.parent)).write_bytes(NAME, b"".join(map(_encode, kept)))
        with explained(str(self.local)):
            # Unbuffered: one line is one system call, which a SIGKILL cannot cut in two.
            self._file = self.local.open("ab", buffering=0)
        self._uploaded, self._uploaded_at = -1, -math.inf

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line; it has reached the operating system on return.

        Raises ValueError for a step that is not above the last one, or a name that is no metric's,
        and InfraError where the disk refuses.
        """
        if step <= self._last:
            raise ValueError(f"step {step} follows step {self._last}; a journal only goes forward")
        for name in metrics:
            if name in CLOCK or not METRIC.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a metric; use letters, digits and _ . / -")
        values = {name: float(value) for name, value in metrics.items()}
        with explained(str(self.local)):
            self._file.write(_encode({"step": step, "time": round(time.time(), 3), **values}))
        self._last = step

    def sync(self, every: float = 0.0) -> None:
        """Upload the journal to its object store; on a disk it is there already.

        Does nothing where the store has every line, or got some less than `every` seconds ago.
        Raises InfraError where the store refuses.
        """
        size, now = self.local.stat().st_size, time.monotonic()
        if self._spool and size != self._uploaded and now >= self._uploaded_at + every:
            self.folder.write_bytes(NAME, self.local.read_bytes())
            self._uploaded, self._uploaded_at = size, now

    def close(self) -> None:
        """Upload what is left and let go of the file."""
        try:
            self.sync()
        finally:
            self._file.close()
            if self._spool:
                self._spool.cleanup()


def read(folder: str | Folder) -> list[dict[str, float]]:
    """The lines of a run directory's journal, non-finite values as floats; none where none is."""
    folder = Folder.at(folder)
    if not folder.exists(NAME):
        return []
    return [row for row, _ in parse(folder.read_bytes(NAME), folder.url_of(NAME))]


def parse(content: bytes, where: str) -> Iterator[tuple[dict[str, float], int]]:
    """Each line's values, and the offset at which the line ends; a torn tail is passed over.

    Raises DataError for a line that is no journal's.
    """
    end, last = 0, -1
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        end += len(line)
        try:
            row = _decode(line)
            if row["step"] <= last:
                raise ValueError("a journal only goes forward")
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
        raise ValueError("no such step, or no such metric")
    return {"step": step, "time": float(seconds)} | {k: float(v) for k, v in values.items()}


def _encode(row: Mapping[str, float]) -> bytes:
    plain = {k: v if math.isfinite(v) else json.dumps(v) for k, v in row.items()}
    return json.dumps(plain).encode() + os.linesep.encode()
