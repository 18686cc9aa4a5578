"""Runs: what every verb that makes a run directory has in common, as one function, `carry_out`."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from infra import cluster, documents, tracking
from infra.config import digest, flatten, parse, to_tree, to_yaml
from infra.console import say
from infra.errors import ConfigError, DataError, Problem
from infra.journal import Journal, Logger
from infra.lease import Lease, held
from infra.shards import Manifest
from infra.storage import Folder
from infra.tracking import RunHandle
from pipelines import models
from pipelines.verb import RunSettings

RESULT = "result.json"
# What may differ when a run is continued: where it runs, how it is shown, and how often it
# writes. Everything else decides what the weights become.
FREE = ("existing", "register", "workers.", "tracking.", "train.checkpoint.", "train.log_every")

log = logging.getLogger(__name__)

Dataset = Mapping[str, str]  # `name`, `digest` and `source`, as MLflow shows them


class Run(NamedTuple):
    """A run directory into which this process alone may write, and the run in MLflow."""

    folder: Folder
    lease: Lease
    handle: RunHandle


class Made(NamedTuple):
    """What a run has made. `files` are its report; with one, `result["metrics"]` go to MLflow."""

    result: dict[str, Any]
    files: Mapping[str, bytes] = MappingProxyType({})


@dataclass(kw_only=True)
class Task(ABC):
    """What one verb does in its run directory. `carry_out` calls the methods in this order.

    Any of them may be cut off; the next attempt calls all of them again, in the same directory.
    """

    verb: str
    config: RunSettings
    parent: str | None = None  # id of the MLflow run to show this one under

    free: ClassVar[tuple[str, ...]] = FREE  # how the keys begin that a resumed run may change
    keys: ClassVar[tuple[str, ...]] = ("run",)  # what every result holds

    def stands(self, result: Mapping[str, Any]) -> bool:
        """Whether the result of an earlier attempt is all that is asked for now."""
        return True

    @abstractmethod
    def prepare(self, folder: Folder) -> tuple[Dataset | None, Mapping[str, str]]:
        """Check all that is given, and write what `work` starts from; (the data, if there is any;
        tags), for MLflow. An error here leaves no new run directory behind."""

    @abstractmethod
    def work(self, run: Run) -> None:
        """The part that takes long."""

    @abstractmethod
    def conclude(self, run: Run) -> Made:
        """Write what was made. The right to write has just been confirmed."""

    def register(self, run: Run, result: Mapping[str, Any]) -> dict[str, Any] | None:
        """Act on the registry, after the MLflow run has ended; what to add to the result.

        None where the server does not answer: then the result is not kept, so that the same
        command tries again.
        """
        return {}


def carry_out(task: Task) -> dict[str, Any]:
    """Run a task to its end, from wherever an earlier attempt left it; what was made."""
    config = task.config
    with opened(config, task.verb, task.free) as lease:
        folder = lease.run
        if folder.exists(RESULT):
            before = result(folder, *task.keys)
            if task.stands(before):
                say(f"{folder.url} is finished; existing=restart would make it anew")
                return _deliver(lease, before)
        with _beginning(lease, config, task.verb):
            handle = _start(task, *task.prepare(folder))
        run = Run(folder, lease, handle)
        say(f"run {folder.url}; metrics: {tracking.page(handle)}")
        with _ending(run):
            task.work(run)
            lease.confirm()
            made = task.conclude(run)
            if made.files:
                _publish(run, made)
        run = run._replace(handle=tracking.finish(handle))
        found = {"run": folder.url, "run_id": run.handle.run_id, **made.result}
        registered = task.register(run, found)
        if registered is None:
            return found | {"model_uri": None}
        found |= registered
        lease.confirm()  # again: this may have taken minutes
        folder.write_bytes(RESULT, json.dumps(found).encode())
        return found


def _deliver(lease: Lease, found: dict[str, Any]) -> dict[str, Any]:
    """Send a finished run to the MLflow server that was away when it ended; its result."""
    try:
        if not tracking.delivered(lease.run):
            found = found | {"run_id": tracking.replay(lease.run.url).run_id}
            lease.confirm()
            lease.run.write_bytes(RESULT, json.dumps(found).encode())
    except Problem as problem:  # the run stays finished all the same
        log.warning("%s", problem)
    return found


@contextmanager
def opened(config: RunSettings, verb: str, free: tuple[str, ...] = FREE) -> Iterator[Lease]:
    """The run directory, `.run` of what is yielded: new, wiped, or the one of an earlier attempt
    with the same settings. Inside the block this process alone may write into it.

    free: how the keys begin whose values may differ from those of the earlier attempt. Raises
    ConfigError where the directory holds a run with other settings, or is no run, and InfraError
    where another process has the right to write there.
    """
    folder = config.folder
    with held(folder) as lease:
        _open(folder, config, verb, free)
        yield lease


def _open(folder: Folder, config: RunSettings, verb: str, free: tuple[str, ...]) -> None:
    if not folder.exists(tracking.CONFIG):
        if folder.names():
            raise ConfigError("name", f"{folder.url} exists and is not a run", "Choose another")
        return
    if config.existing == "restart":
        folder.require_removable()  # now, so that it is whole if it is not
        # Where this is cut off, what is left must not be taken for finished, nor a model for that
        # of other checkpoints.
        for name in (RESULT, *reversed(folder.names())):
            if name != tracking.CONFIG:  # which goes last: without it, this would be no run
                folder.remove(name)
        folder.remove()
        return
    before = flatten(parse(folder.read_bytes(tracking.CONFIG), folder.url_of(tracking.CONFIG)))
    now = flatten({verb: to_tree(config)})
    decisive = {
        key
        for key in before.keys() | now.keys()
        if not key.partition(".")[2].startswith(free) and before.get(key) != now.get(key)
    }
    if decisive:
        shown = ", ".join(f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in sorted(decisive)[:5])
        raise ConfigError(
            "name",
            f"{folder.url} is a run with other settings ({shown})",
            "Choose another name, or existing=restart to wipe it",
        )
    folder.remove_partial()


def result(folder: Folder, *keys: str) -> dict[str, Any]:
    """The result of a finished run; DataError where it lacks one of these keys."""
    fix = "Remove the file; the same command writes it anew"
    made: dict[str, Any] = documents.load(folder, RESULT, dict[str, Any], fix)
    if missing := [key for key in keys if key not in made]:
        raise DataError(folder.url_of(RESULT), f"says nothing of {', '.join(missing)}", fix)
    return made


@contextmanager
def _beginning(lease: Lease, config: RunSettings, verb: str) -> Iterator[None]:
    """Around all that comes before the MLflow run: a kill leaves a run to resume, an error what
    was there before, or what the process that took the run over has there."""
    folder = lease.run
    if folder.exists(tracking.CONFIG):
        yield
        return
    folder.write_bytes(tracking.CONFIG, to_yaml(config, verb).encode())
    try:
        yield
    except Exception:
        with suppress(Problem):
            lease.confirm()
            folder.remove()
        raise


def dataset(manifests: Mapping[str, Manifest]) -> Dataset:
    """What MLflow is told of shards, by their address: of one source, or of several as one, whose
    digest is that of their digests."""
    digests = [manifest.digest for manifest in manifests.values()]
    return {
        "name": " + ".join(manifest.source for manifest in manifests.values()),
        "digest": digests[0] if len(digests) == 1 else digest(digests),
        "source": " ".join(Folder.at(url).url for url in manifests),
    }


def _start(task: Task, data: Dataset | None, tags: Mapping[str, str]) -> RunHandle:
    """Open the MLflow run of a run directory, with all that says where it came from."""
    config, commit = task.config, cluster.commit()
    return tracking.start(
        config.tracking,
        root=config.root,
        name=config.name,
        params=to_tree(config),
        tags={
            "verb": task.verb,
            "commit": commit.sha if commit else "unknown",
            "dirty": str(bool(commit and commit.dirty)).lower(),
            "config_hash": digest(config),
            "ray_job_id": cluster.job_id() or "none",
            **tags,
        },
        config_yaml=to_yaml(config, task.verb),
        dataset=data,
        parent=task.parent,
    )


@contextmanager
def _ending(run: Run) -> Iterator[None]:
    """Show in MLflow that a run was cut off, if it was and is still this process's."""
    try:
        yield
    except BaseException as error:
        # An interrupt, a notice, or the exit by which Ray Tune halts a trial is no failure.
        status: tracking.Status = "FAILED" if isinstance(error, Exception) else "KILLED"
        try:
            run.lease.confirm()
            tracking.finish(run.handle, status)
        except Problem as problem:  # the first error is the one to tell
            log.warning("the end of the run is not recorded: %s", problem)
        raise


def _publish(run: Run, made: Made) -> None:
    """Keep a report in the run directory, and show it and its figures in MLflow."""
    place = run.folder / "report"
    for name, content in made.files.items():
        place.write_bytes(name, content)
    journal = Journal(run.folder, permit=run.lease.confirm)
    logger = Logger(journal, run.handle)
    logger.log(0, made.result["metrics"])
    logger.close()
    tracking.log_artifacts(run.handle, place.url)


def register(
    model: Folder, name: str | None, handle: RunHandle, tags: Mapping[str, str]
) -> dict[str, Any] | None:
    """Register a model folder as a candidate, if a name is given; as `Task.register` returns it."""
    if name is None:
        return {}
    if handle.run_id is None:
        say(f"not registered: {handle.uri} does not answer; the same command tries again")
        return None
    version = models.register(model, name, handle, tags=tags)
    return {"model_uri": version.uri, "alias_uri": version.candidate_uri}
