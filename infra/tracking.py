"""Runs at MLflow. The run directory is the record; MLflow shows a copy of it.

`run.json` holds what MLflow is told of a run (name, parameters, tags, data set, final status) and
the run's id once a server has answered. `metrics.jsonl` (see `infra.journal`) holds the metrics.
Both are written first and then sent, so a server that is slow or away never stops training.
`replay(folder)` sends whatever a server lacks, as often as it is called; `finish` includes it.

The driver owns the run (`start`, `finish`). Rank 0 gets its `RunHandle` and gives the metrics to a
`journal.Logger`. One run directory is one MLflow run, however often it is resumed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from infra import documents, journal
from infra.config import flatten
from infra.errors import ConfigError, DataError, InfraError, Problem
from infra.journal import Sender, batches, reason
from infra.storage import Folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

RECORD = "run.json"
CONFIG = "config.yaml"
SQLITE = "sqlite:///"
ADDRESS = f"Use http(s)://host:port of an MLflow server, or {SQLITE}path/mlflow.db"
KEY = "run_key"  # the tag that finds a run whose id was never written down
# MLflow's limits. The server refuses what exceeds them.
PARAMS_A_BATCH, TAGS_A_BATCH = 100, 100
PARAM_LENGTH, TAG_LENGTH, DIGEST_LENGTH, NAME_LENGTH = 6000, 8000, 36, 500
# With MLflow's own settings one call to a dead server takes minutes.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the last line there is the verb's own
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are shown: `uri` is an MLflow server (http…) or a database (sqlite:///…).

    None is the embedded default, `mlflow.db` in the folder that holds the runs.
    """

    uri: str | None = None
    experiment: str


@dataclass(frozen=True, kw_only=True)
class RunHandle:
    """What a worker needs to know of a run; `run_id` is None if no server answered at the start."""

    folder: str
    uri: str
    run_id: str | None

    def connect(self) -> MlflowClient:
        return connect(self.uri)


def start(
    config: TrackingConfig,
    *,
    root: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    config_yaml: str,
    dataset: Mapping[str, str] | None = None,
    parent: str | None = None,
) -> RunHandle:
    """Open the MLflow run of the run directory `root/name`; called by the driver.

    A directory that has a `run.json` is being resumed: its run is reopened, with new tags and
    config.yaml and its old parameters (MLflow never changes one). Otherwise a run is made. Writes
    `run.json` and `config.yaml` into the directory.

    params: the resolved configuration, nested; flattened to dotted names here.
    tags: commit, dirty, config hash, Ray job id, parent model: what should be searchable.
    dataset: `name`, `digest` (the manifest's) and `source` (a URL).
    parent: id of the run that this one is shown under.

    If the server does not answer, a warning is logged and the handle has no run id: metrics go to
    the journal alone, and `finish` or `replay` makes the run. Raises as `connect` does, and
    DataError where the data set is no longer the one that the run began with.
    """
    folder, uri = Folder.at(root) / name, locate(config, root)
    record = _Record(
        key=uuid.uuid4().hex,
        uri=uri,
        experiment=config.experiment,
        name=name,
        created=_now(),
        params={
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in flatten(dict(params)).items()
        },
        tags={**tags, **({"mlflow.parentRunId": parent} if parent else {})},
        dataset=dict(dataset) if dataset else None,
        sent=False,
    )
    if folder.exists(RECORD):
        before = _Record.load(folder)
        require_same_data(before.dataset, record.dataset)
        record.key, record.created, record.artifacts = before.key, before.created, before.artifacts
        if (before.uri, before.experiment) == (uri, config.experiment):
            record.experiment_id, record.run_id = before.experiment_id, before.run_id
    folder.write_bytes(CONFIG, config_yaml.encode())
    record.save(folder)
    client = connect(uri)
    with _failures_logged(folder, uri):
        _open(client, record, folder)
    return record.handle(folder)


def require_same_data(before: Mapping[str, str] | None, now: Mapping[str, str] | None) -> None:
    """DataError where two data sets, as `start` takes them, are known to differ."""
    if before and now and before["digest"] != now["digest"]:
        digests = f"{before['digest'][:12]}, now {now['digest'][:12]}"
        raise DataError(
            now["source"],
            f"not the data that this run began with (digest {digests})",
            "Prepare it as it was, choose another name, or wipe the run with existing=restart",
        )


def finish(
    handle: RunHandle, status: Status = "FINISHED", tags: Mapping[str, str] = MappingProxyType({})
) -> RunHandle:
    """Close the run, with more tags, after sending all that the server lacks. A server that is
    away is logged as a warning. A run that is closed already may be closed again."""
    folder = Folder.at(handle.folder)
    record = _Record.load(folder)
    record.status, record.ended, record.tags = status, _now(), record.tags | dict(tags)
    record.sent = False
    record.save(folder)
    with _failures_logged(folder, record.uri):
        return _replay(record, folder)
    return handle


def opened(folder: str) -> RunHandle | None:
    """The handle of a directory's run; None if the directory has no record of one."""
    place = Folder.at(folder)
    return _Record.load(place).handle(place) if place.exists(RECORD) else None


def delivered(folder: Folder) -> bool:
    """Whether the server has taken all of a run that has ended; DataError for a damaged record."""
    return _Record.load(folder).sent


def log_artifacts(handle: RunHandle, place: str | Path) -> None:
    """Show the files of a folder among the run's artifacts, under its own name. If the server is
    away, `finish` or `replay` sends them."""
    folder = Folder.at(handle.folder)
    record = _Record.load(folder)
    record.artifacts.append(Folder.at(str(place)).url)
    record.save(folder)
    if record.run_id:
        with _failures_logged(folder, record.uri):
            _send_artifacts(connect(record.uri), record, folder)


def replay(folder: str) -> RunHandle:
    """Bring the server up to date with a run directory: the run, its metrics, its final status.

    Nothing is sent twice, so it may be called for any run at any time. InfraError if the server
    is away or refuses.
    """
    place = Folder.at(folder)
    record = _Record.load(place)
    try:
        return _replay(record, place)
    except Problem:
        raise
    except Exception as error:
        why = f"MLflow at {record.uri} did not take the run ({reason(error)})"
        fix = "Check the server, then run the same command again"
        raise InfraError(place.url, why, fix) from None


def page(handle: RunHandle) -> str:
    """How to see the run: a command for a database, the address of its page for a server."""
    if not handle.uri.startswith("http"):
        return f"mlflow ui --backend-store-uri {shlex.quote(handle.uri)}"
    record = _Record.load(Folder.at(handle.folder))
    if record.run_id is None:
        return handle.uri
    return f"{handle.uri}/#/experiments/{record.experiment_id}/runs/{record.run_id}"


def locate(config: TrackingConfig, root: str) -> str:
    """The tracking URI that a configuration means for the runs in `root`, free of credentials.

    A relative path of a database is made absolute: workers run in other folders.
    """
    uri, runs = config.uri, Folder.at(root)
    if uri is None:
        if not runs.is_local:
            why = f"the runs are in {runs.url}, where no database can be kept"
            raise ConfigError("tracking.uri", why, f"Name a server, or {SQLITE}path/mlflow.db")
        uri = f"{SQLITE}{runs.path}/mlflow.db"
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError("tracking.uri", f"not a URL ({error})", ADDRESS) from None
    if not uri.removeprefix(SQLITE) or (uri.startswith("http") and not host):
        raise ConfigError("tracking.uri", f"{uri!r} names no server and no database", ADDRESS)
    if parts.password:
        fix = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        raise ConfigError("tracking.uri", "holds a password, which every run would show", fix)
    if uri.startswith(SQLITE):
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).resolve()}"
    return uri.rstrip("/")


def connect(uri: str) -> MlflowClient:
    """A client that gives up after seconds. A database that does not exist yet is made, by one
    process while the others wait. ConfigError for an address that MLflow does not take, InfraError
    for a database that cannot be opened."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    # One warning of ours says what urllib3 would repeat at every attempt.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    try:
        return _connect(uri)
    except Exception as error:
        if uri.startswith(SQLITE):
            fix = "Restore or move the file, or choose another tracking.uri"
            raise InfraError(uri, f"MLflow cannot open it ({reason(error)})", fix) from None
        why = f"cannot open {uri} ({reason(error)})"
        raise ConfigError("tracking.uri", why, ADDRESS) from None


def _connect(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    if not uri.startswith(SQLITE):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    path = Path(uri.removeprefix(SQLITE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed or the process ends
        if not path.exists():
            _make_database(path)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)  # adds the default experiment


def _make_database(path: Path) -> None:
    """A database with MLflow's tables, which gets its name only when it is complete.

    MLflow makes the tables in a hundred steps that take seconds. If two processes do so at once,
    or one is killed meanwhile, MLflow can never open that database again.
    """
    from mlflow.db import upgrade

    new = path.with_name(f"{path.name}.new")
    for left in path.parent.glob(f"{new.name}*"):  # a killed process's database and its journal
        left.unlink()
    upgrade.callback(f"{SQLITE}{new}")
    new.replace(path)


@dataclass(kw_only=True)
class _Record:
    """`run.json`: all that is needed to make the run on a server that has never seen it."""

    key: str
    uri: str
    experiment: str
    name: str
    created: int  # milliseconds since the epoch, as MLflow counts
    params: dict[str, str]
    tags: dict[str, str]
    dataset: dict[str, str] | None
    run_id: str | None = None
    experiment_id: str | None = None
    status: str = "RUNNING"
    ended: int | None = None
    artifacts: list[str] = field(default_factory=list)  # folders that are not sent yet
    sent: bool = True  # all of it, the end included; older records do not say

    @classmethod
    def load(cls, folder: Folder) -> _Record:
        fix = "Remove the file to have a new run made, or take it from another copy"
        record: _Record = documents.load(folder, RECORD, cls, fix)
        return record

    def save(self, folder: Folder) -> None:
        folder.write_bytes(RECORD, json.dumps(asdict(self), indent=1).encode())

    def handle(self, folder: Folder) -> RunHandle:
        return RunHandle(folder=folder.url, uri=self.uri, run_id=self.run_id)


def _replay(record: _Record, folder: Folder) -> RunHandle:
    client = connect(record.uri)
    run_id, handle = _open(client, record, folder), record.handle(folder)
    if folder.exists(journal.NAME):
        Sender(handle).send(folder.read_bytes(journal.NAME), folder.url_of(journal.NAME))
    _send_artifacts(client, record, folder)
    if record.ended:
        client.set_terminated(run_id, record.status, record.ended)
        record.sent = True
        record.save(folder)
    return handle


def _open(client: MlflowClient, record: _Record, folder: Folder) -> str:
    """Make or find the record's run and send it what it lacks; its id. May be interrupted and
    repeated."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

    record.experiment_id = _experiment(client, record)
    run = _known(client, record.run_id) or _find_or_create(client, record)
    record.run_id = run_id = run.info.run_id
    record.save(folder)
    known = run.data.params
    params = [Param(k, v[:PARAM_LENGTH]) for k, v in record.params.items() if k not in known]
    for batch in batches(params, PARAMS_A_BATCH):
        client.log_batch(run_id, params=batch)
    tags = [RunTag(k, str(v)[:TAG_LENGTH]) for k, v in record.tags.items()]
    for batch in batches(tags, TAGS_A_BATCH):
        client.log_batch(run_id, tags=batch)
    if data := record.dataset:
        shown = Dataset(
            name=data["name"][:NAME_LENGTH],
            digest=data["digest"][:DIGEST_LENGTH],
            source_type=urlsplit(data["source"]).scheme or "local",
            source=json.dumps({"uri": data["source"]}),
            profile=json.dumps({"digest": data["digest"]}),  # in full length
        )
        context = InputTag("mlflow.data.context", "training")
        client.log_inputs(run_id, datasets=[DatasetInput(shown, [context])])
    client.log_text(run_id, folder.read_bytes(CONFIG).decode(), CONFIG)
    client.update_run(run_id, status="RUNNING")
    return run_id


def _known(client: MlflowClient, run_id: str | None) -> Run | None:
    """The run of an id; None where the server has none, as its database may have been removed."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _find_or_create(client: MlflowClient, record: _Record) -> Run:
    """The run; an earlier process may have died before it wrote its id down."""
    found = client.search_runs([record.experiment_id], f"tags.{KEY} = '{record.key}'")
    if found:
        return found[0]
    return client.create_run(
        record.experiment_id, record.created, tags={KEY: record.key}, run_name=record.name
    )


def _experiment(client: MlflowClient, record: _Record) -> str:
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(record.experiment):
        return found.experiment_id
    # By default MLflow puts a database's artifacts into the process's working directory.
    beside = None
    if record.uri.startswith(SQLITE):
        beside = str(Path(record.uri.removeprefix(SQLITE)).parent / "artifacts")
    try:
        return client.create_experiment(record.experiment, artifact_location=beside)
    except MlflowException:  # another run has just made it
        if found := client.get_experiment_by_name(record.experiment):
            return found.experiment_id
        raise


def _send_artifacts(client: MlflowClient, record: _Record, folder: Folder) -> None:
    while record.artifacts:
        place = Folder.at(record.artifacts[0])
        if place.exists():
            with place.local() as local:
                client.log_artifacts(record.run_id, str(local), local.name)
        del record.artifacts[0]
        record.save(folder)


@contextmanager
def _failures_logged(folder: Folder, uri: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text = "%s is not on MLflow at %s (%s). The same command sends it later"
        log.warning(text, folder.url, uri, reason(error))


def _now() -> int:
    return round(1000 * time.time())
