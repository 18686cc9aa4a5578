"""Metrics on their way to MLflow: never in the way of training, none lost, none doubled."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import Problem
from infra.journal import CLOCK, Journal, parse
from infra.storage import scrub

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from infra.tracking import RunHandle

log = logging.getLogger(__name__)

SQLITE = "sqlite:///"
LONGEST_WAIT_S = 60.0  # between two attempts while a server is away
UPLOAD_EVERY_S = 30.0  # the whole journal each time, where it lives in an object store
LINES_A_BATCH = 100
METRICS_A_BATCH = 1000  # MLflow's limit
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the last line there is the verb's own
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Logger:
    """Rank 0's metrics on their way: to the journal at once, to MLflow when MLflow can.

    `log` writes one line to the journal and returns. A thread sends what the journal holds and
    the server lacks, every `interval` seconds, less often while the server is away. No failure of
    MLflow or of an upload reaches the caller; the first of a row is a warning.
    """

    def __init__(self, journal: Journal, handle: RunHandle, *, interval: float = 2.0) -> None:
        self._journal = journal
        self._sender = Sender(handle.uri, handle.run_id) if handle.run_id else None
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
        """Have every line so far in the run's store: called before a checkpoint is to count, so
        that a run which goes on from there lacks none. A store that refuses costs a warning."""
        try:
            self._journal.sync()
        except Problem as problem:
            log.warning("%s", problem)

    def close(self, patience: float = 15.0) -> int:
        """Send what is left for at most `patience` seconds; return how many lines are unsent.

        Those lines stay in the journal, from which `finish` or `replay` sends them.
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
        except Exception as error:  # the promise of this class: training never hears of it
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

    A killed process may have sent lines that its successor knows nothing of, and steps that the
    server has are redone. So the server is asked, once for each metric, for its highest step;
    what lies at or below is skipped, as a journal only goes forward. A batch whose answer was
    lost is the same case: after a failure the server is asked again.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.offset = 0  # bytes of the journal that the server has
        self._uri, self._run_id = uri, run_id
        self._highest: dict[str, int] = {}

    def send(self, lines: bytes, where: str) -> None:
        """Send the lines that follow `offset`, which moves with every batch the server takes."""
        from mlflow.entities import Metric

        client = connect(self._uri)
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


def connect(uri: str) -> MlflowClient:
    """A client that gives up soon: with MLflow's own settings a dead server blocks for minutes.

    A database that is not there yet is made, by one process while the others wait.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    # One warning of ours says what urllib3 would repeat at every attempt.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    from mlflow import MlflowClient

    if not uri.startswith(SQLITE):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    path = Path(uri.removeprefix(SQLITE))
    with _alone(path):
        if not path.exists():
            _create(path)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)  # adds the default experiment


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it, the file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _create(path: Path) -> None:
    """A database with MLflow's tables, under its name only once it is whole.

    MLflow makes one in a hundred steps that take seconds, and two processes in it at once, or one
    that is killed, leave a database that MLflow never opens again.
    """
    from mlflow.db import upgrade

    new = path.with_name(f"{path.name}.new")
    for left in path.parent.glob(f"{new.name}*"):  # by a process that was killed, and its journal
        left.unlink()
    upgrade.callback(f"{SQLITE}{new}")
    new.replace(path)


def reason(error: Exception) -> str:
    """Why MLflow failed, on one short line free of credentials: fit to stand in a message."""
    if isinstance(error.__context__, OSError):  # all of requests' errors are
        return f"no answer, {type(error.__context__).__name__}"
    lines = scrub(str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
