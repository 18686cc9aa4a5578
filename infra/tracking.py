"""Tracking: MLflow as a mirror of the run directory.

The run directory is the record. `run.json` holds what MLflow is told of a run (name, parameters,
tags, data set, how it ended) and, once a server has answered, the run's id; `metrics.jsonl` (see
`infra.journal`) holds the metrics. Everything is written there first and only then sent, so a
server that is slow, away or gone never stops training: `replay(folder)` sends whatever a server
lacks, at any time and as often as one likes, and `finish` does so by itself.

The driver owns the run (`start`, `finish`); rank 0 gets its `RunHandle` and gives a `Logger` the
metrics. One run directory is one MLflow run, however often it is resumed.
"""

from __future__ import annotations

import json
import logging
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
from infra.errors import ConfigError, InfraError, Problem
from infra.journal import Journal
from infra.logger import SQLITE, Logger, Sender, batches, connect, reason
from infra.storage import Folder, scrub

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

RECORD = "run.json"
CONFIG = "config.yaml"
KEY = "run_key"  # the tag by which a run is found again whose id was never heard
# MLflow's limits, of which the server lets none be passed.
PARAMS_A_BATCH, TAGS_A_BATCH = 100, 100
PARAM_LENGTH, TAG_LENGTH, DIGEST_LENGTH = 6000, 8000, 36

__all__ = [
    "Journal",
    "Logger",
    "RunHandle",
    "TrackingConfig",
    "finish",
    "locate",
    "log_artifacts",
    "opened",
    "page",
    "replay",
    "start",
]

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are shown: `uri` is an MLflow server (http…) or a database (sqlite:///…).

    None is the embedded default, `mlflow.db` in the folder that holds the runs.
    """

    uri: str | None = None
    experiment: str = "dsl"


@dataclass(frozen=True, kw_only=True)
class RunHandle:
    """What a worker needs to know of a run; `run_id` is None where no server answered at start."""

    folder: str
    uri: str
    run_id: str | None


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

    A directory that has a `run.json` is being resumed: its run is opened again and runs on, with
    new tags and config.yaml and the parameters it had (MLflow never changes one). Otherwise a run
    is made. Writes `run.json` and `config.yaml` into the directory.

    params: the resolved configuration, nested as it is; flattened to dotted names here.
    tags: commit, dirty, config hash, Ray job id, parent model: what should be searchable.
    dataset: `name`, `digest` (the manifest's) and `source` (a URL).
    parent: id of the run that this one is shown under.

    A server that does not answer costs one warning; the handle then has no run id, metrics go to
    the journal alone, and `finish` or `replay` makes the run. ConfigError for a uri that cannot
    be one.
    """
    folder, uri = Folder.at(root) / name, locate(config, root)
    record = _Record(
        key=uuid.uuid4().hex,
        uri=uri,
        experiment=config.experiment,
        name=name,
        created=_now(),
        params=_flatten(params),
        tags={**tags, **({"mlflow.parentRunId": parent} if parent else {})},
        dataset=dict(dataset) if dataset else None,
    )
    if folder.exists(RECORD):
        before = _Record.load(folder)
        record.key, record.created, record.artifacts = before.key, before.created, before.artifacts
        if (before.uri, before.experiment) == (uri, config.experiment):
            record.run_id = before.run_id
    folder.write_bytes(CONFIG, config_yaml.encode())
    record.save(folder)
    try:
        client = connect(uri)
    except Exception as error:
        fix = f"Use http(s)://host:port of an MLflow server, or {SQLITE}path/mlflow.db"
        raise ConfigError("tracking.uri", f"cannot open {uri} ({reason(error)})", fix) from None
    with _forgiving(folder, uri):
        _open(client, record, folder)
    return record.handle(folder)


def finish(
    handle: RunHandle, status: Status = "FINISHED", tags: Mapping[str, str] = MappingProxyType({})
) -> RunHandle:
    """Close the run, with more tags, after sending all that the server lacks; one warning if it
    is away. A run that is closed already may be closed again."""
    folder = Folder.at(handle.folder)
    record = _Record.load(folder)
    record.status, record.ended, record.tags = status, _now(), record.tags | dict(tags)
    record.save(folder)
    with _forgiving(folder, record.uri):
        return _replay(record, folder)
    return handle


def opened(folder: str) -> RunHandle | None:
    """The handle of the run that a directory has a record of."""
    place = Folder.at(folder)
    return _Record.load(place).handle(place) if place.exists(RECORD) else None


def log_artifacts(handle: RunHandle, local: str | Path) -> None:
    """Show a local folder among the run's artifacts, under its own name; later if need be."""
    folder = Folder.at(handle.folder)
    record = _Record.load(folder)
    record.artifacts.append(str(Path(local).resolve()))
    record.save(folder)
    if record.run_id:
        with _forgiving(folder, record.uri):
            _send_artifacts(connect(record.uri), record, folder)


def replay(folder: str) -> RunHandle:
    """Bring the server up to date with a run directory: the run, its metrics, how it ended.

    Nothing is doubled, so it may be called for any run and as often as one likes. InfraError
    where the server is away or refuses.
    """
    place = Folder.at(folder)
    record = _Record.load(place)
    try:
        return _replay(record, place)
    except Problem:
        raise
    except Exception as error:
        why = f"MLflow at {record.uri} did not take the run ({reason(error)})"
        raise InfraError(place.url, why, "Check the server, then replay again") from None


def page(handle: RunHandle) -> str:
    """How to see the run: a command for a database, the address of its page for a server."""
    if not handle.uri.startswith("http"):
        return f"mlflow ui --backend-store-uri {handle.uri}"
    record = _Record.load(Folder.at(handle.folder))
    if record.run_id is None:
        return handle.uri
    return f"{handle.uri}/#/experiments/{record.experiment_id}/runs/{record.run_id}"


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
    artifacts: list[str] = field(default_factory=list)  # local folders that wait to be sent

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
    run_id = _open(client, record, folder)
    if folder.exists(journal.NAME):
        lines = folder.read_bytes(journal.NAME)
        Sender(record.uri, run_id).send(lines, folder.url_of(journal.NAME))
    _send_artifacts(client, record, folder)
    if record.ended:
        client.set_terminated(run_id, record.status, record.ended)
    return record.handle(folder)


def _open(client: MlflowClient, record: _Record, folder: Folder) -> str:
    """Make the record's run, or find it, and give it what it lacks; may be cut short and redone."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

    record.experiment_id = _experiment(client, record)
    record.run_id = record.run_id or _find(client, record) or _create(client, record)
    record.save(folder)
    run_id = record.run_id
    known = client.get_run(run_id).data.params
    params = [Param(k, v[:PARAM_LENGTH]) for k, v in record.params.items() if k not in known]
    for batch in batches(params, PARAMS_A_BATCH):
        client.log_batch(run_id, params=batch)
    tags = [RunTag(k, str(v)[:TAG_LENGTH]) for k, v in record.tags.items()]
    for batch in batches(tags, TAGS_A_BATCH):
        client.log_batch(run_id, tags=batch)
    if data := record.dataset:
        shown = Dataset(
            name=data["name"],
            digest=data["digest"][:DIGEST_LENGTH],
            source_type=urlsplit(data["source"]).scheme or "local",
            source=json.dumps({"uri": scrub(data["source"])}),
            profile=json.dumps({"digest": data["digest"]}),  # whole
        )
        context = InputTag("mlflow.data.context", "training")
        client.log_inputs(run_id, datasets=[DatasetInput(shown, [context])])
    client.log_text(run_id, folder.read_bytes(CONFIG).decode(), CONFIG)
    client.update_run(run_id, status="RUNNING")
    return run_id


def _create(client: MlflowClient, record: _Record) -> str:
    run = client.create_run(
        record.experiment_id,
        start_time=record.created,
        run_name=record.name,
        tags={KEY: record.key},
    )
    return run.info.run_id


def _find(client: MlflowClient, record: _Record) -> str | None:
    """The run's id, if it was made by a process that did not live to write the id down."""
    found = client.search_runs([record.experiment_id], f"tags.{KEY} = '{record.key}'")
    return found[0].info.run_id if found else None


def _experiment(client: MlflowClient, record: _Record) -> str:
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(record.experiment):
        return found.experiment_id
    # Left alone, a database would put artifacts under whatever folder the process is in.
    beside = None
    if record.uri.startswith(SQLITE):
        beside = str(Path(record.uri.removeprefix(SQLITE)).parent / "artifacts")
    try:
        return client.create_experiment(record.experiment, artifact_location=beside)
    except MlflowException:  # another run was quicker
        if found := client.get_experiment_by_name(record.experiment):
            return found.experiment_id
        raise


def _send_artifacts(client: MlflowClient, record: _Record, folder: Folder) -> None:
    while record.artifacts:
        local = Path(record.artifacts[0])
        if local.is_dir():
            client.log_artifacts(record.run_id, str(local), local.name)
        del record.artifacts[0]
        record.save(folder)


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
    if urlsplit(uri).password:
        fix = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        raise ConfigError("tracking.uri", "holds a password, which every run would show", fix)
    if uri.startswith(SQLITE):
        path = Path(uri.removeprefix(SQLITE)).resolve()
        return f"{SQLITE}{path}"
    return uri.rstrip("/")


@contextmanager
def _forgiving(folder: Folder, uri: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text = "%s is not on MLflow at %s (%s). The record is in the folder; replay it later"
        log.warning(text, folder.url, uri, reason(error))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names to strings; what is neither a mapping nor a string is written as JSON."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[f"{prefix}{name}"] = text
    return flat


def _now() -> int:
    return round(1000 * time.time())
