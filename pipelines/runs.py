"""Run directories: opened, resumed or refused, and shown in MLflow. What every verb that makes a
run has in common."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, Protocol

from dsl.errors import VocabularyError, WeightsError
from infra import cluster, documents, tracking
from infra.config import digest, flatten, parse, to_tree, to_yaml
from infra.errors import ConfigError, DataError, Problem
from infra.lease import Held, held
from infra.shards import Manifest
from infra.storage import Folder
from infra.tracking import RunHandle, TrackingConfig

RESULT = "result.json"
# What may differ when a run is continued: where it runs, how it is shown, and how often it
# writes. Everything else decides what the weights become.
FREE = ("existing", "register", "workers.", "tracking.", "train.checkpoint.", "train.log_every")
# What counts as bad data or weights beside infra's own errors.
DATA_ERRORS = (WeightsError, VocabularyError)


class Settings(Protocol):
    """What the configuration of a verb that makes a run holds; `data` where it is given any."""

    @property
    def name(self) -> str: ...
    @property
    def root(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def existing(self) -> Literal["resume", "restart"]: ...
    @property
    def tracking(self) -> TrackingConfig: ...


@contextmanager
def opened(config: Settings, verb: str, free: tuple[str, ...] = FREE) -> Iterator[Held]:
    """The run directory, `.run` of what is yielded: new, wiped, or the one of an earlier attempt
    with the same settings; this process's alone for the duration.

    free: how the keys of settings begin that may differ from those of before. Raises ConfigError
    where the directory holds a run of other settings, or no run at all, and InfraError where
    another process is at work there.
    """
    folder = Folder.at(config.root) / config.name
    with held(folder) as holder:
        _open(folder, config, verb, free)
        yield holder


def _open(folder: Folder, config: Settings, verb: str, free: tuple[str, ...]) -> None:
    if not folder.exists(tracking.CONFIG):
        if folder.names():
            raise ConfigError("name", f"{folder.url} exists and is not a run", "Choose another")
        return
    if config.existing == "restart":
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


def result(folder: Folder, *keys: str) -> dict[str, Any]:
    """What a finished run has made, under these keys among others; DataError where none says so."""
    fix = "Remove the file; the same command writes it anew"
    made: dict[str, Any] = documents.load(folder, RESULT, dict[str, Any], fix)
    if missing := [key for key in keys if key not in made]:
        raise DataError(folder.url_of(RESULT), f"says nothing of {', '.join(missing)}", fix)
    return made


@contextmanager
def beginning(folder: Folder, config: Settings, verb: str) -> Iterator[None]:
    """Around what a run does up to `start`: a kill leaves a run to resume, a mistake nothing."""
    if folder.exists(tracking.RECORD):
        yield
        return
    folder.write_bytes(tracking.CONFIG, to_yaml(config, verb).encode())
    try:
        yield
    except Exception:
        with suppress(Problem):
            folder.remove()
        raise


def start(
    config: Settings,
    verb: str,
    manifest: Manifest | None,
    tags: Mapping[str, str],
    parent: str | None = None,
) -> RunHandle:
    """Open the MLflow run of a run directory, with all that says where it came from.

    manifest: of the data, None where a verb takes none.
    """
    commit = cluster.commit()
    dataset = None
    if manifest is not None:
        source = Folder.at(config.data).url
        dataset = {"name": manifest.source, "digest": manifest.digest, "source": source}
    return tracking.start(
        config.tracking,
        root=config.root,
        name=config.name,
        params=to_tree(config),
        tags={
            "verb": verb,
            "commit": commit.sha if commit else "unknown",
            "dirty": str(bool(commit and commit.dirty)).lower(),
            "config_hash": digest(config),
            "ray_job_id": cluster.job_id() or "none",
            **tags,
        },
        config_yaml=to_yaml(config, verb),
        dataset=dataset,
        parent=parent,
    )


@contextmanager
def ending(handle: RunHandle) -> Iterator[None]:
    """Show in MLflow how a run ends that does not come to its end."""
    try:
        yield
    except BaseException as error:
        # An interrupt, a notice, or the exit by which Ray Tune halts a trial is no failure.
        tracking.finish(handle, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise


def publish(
    folder: Folder, handle: RunHandle, files: Mapping[str, bytes], metrics: Mapping[str, float]
) -> RunHandle:
    """Keep a report in the run directory, show it and its figures in MLflow, and finish the run."""
    for name, content in files.items():
        (folder / "report").write_bytes(name, content)
    log = tracking.Logger(tracking.Journal(folder), handle)
    log.log(0, metrics)
    log.close()
    with (folder / "report").local() as place:
        tracking.log_artifacts(handle, place)
    return tracking.finish(handle)


def say(line: str) -> None:
    """Progress for a person; stdout is kept for what was made."""
    print(line, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, for progress."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
