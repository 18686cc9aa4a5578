"""Runs the trials of a sweep side by side with Ray Tune.

Earlier trials are read from their run directories (see `pipelines.sweeping.trials`) and not from
Tune's own state, so a sweep that was killed goes on even on another cluster.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import ray
from ray import tune

from infra import cluster
from infra.cluster import DATA_CPUS
from infra.command import explain
from infra.errors import InfraError
from pipelines import finetune
from pipelines.runs import DATA_ERRORS
from pipelines.sweeping.driver import Proposals, SweepCallback, close, scheduler
from pipelines.sweeping.settings import TRIALS, SweepConfig
from pipelines.sweeping.trials import Trials
from pipelines.training import launch, worker
from pipelines.training.settings import WorkersConfig
from pipelines.training.worker import Assignment

QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journals have it all
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one ignores `verbose`
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would swallow a Ctrl-C
    "TUNE_WARN_THRESHOLD_S": "60",
}


def run(config: SweepConfig, parent: str | None) -> None:
    """Run every trial that has not ended to its end, from its last checkpoint.

    parent: id of the MLflow run of the sweep.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    trials, workers = Trials(folder=config.folder / TRIALS), config.finetune.workers
    needed = int(takes(workers)["CPU"]) - DATA_CPUS  # which are added
    place = workplace(config)
    shutil.rmtree(place, ignore_errors=True)  # what a driver left that was killed
    place.mkdir(mode=0o700)
    try:
        with cluster.connected(workers.cluster, needed_cpus=needed):
            room = concurrent(config, ray.cluster_resources())
            trainable = tune.with_parameters(_trial, config=config, parent=parent)
            tune.Tuner(
                tune.with_resources(trainable, reserved(workers)),
                tune_config=tune.TuneConfig(
                    num_samples=-1,  # as many as are proposed
                    search_alg=Proposals(config, trials),
                    scheduler=scheduler(config, trials),
                    max_concurrent_trials=room,
                ),
                run_config=tune.RunConfig(
                    name=f"{config.name}-{secrets.token_hex(4)}",
                    storage_path=str(place),
                    verbose=0,
                    callbacks=[SweepCallback(config, trials)],
                    failure_config=tune.FailureConfig(max_failures=workers.max_failures),
                ),
            ).fit()
    finally:
        shutil.rmtree(place, ignore_errors=True)
        close(trials)


def workplace(config: SweepConfig) -> Path:
    """Where Tune keeps its own files, which are deleted: the same place for the same sweep."""
    name = hashlib.sha256(config.folder.url.encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"ray-tune-{name}"


def reserved(workers: WorkersConfig) -> dict[str, float]:
    """What Tune reserves for a trial's own process. With one worker this process trains; several
    workers reserve their own resources."""
    if workers.most > 1:
        return {"CPU": 1.0}
    return {**workers.resources, "CPU": float(workers.parallel.threads or 1)}


def takes(workers: WorkersConfig) -> dict[str, float]:
    """All resources of a trial. With several workers, tasks of Ray Data read the rows."""
    own = reserved(workers)
    if workers.most == 1:
        return own
    whole = {key: workers.most * value for key, value in workers.resources.items()}
    return {**whole, "CPU": whole["CPU"] + own["CPU"] + DATA_CPUS}


def concurrent(config: SweepConfig, there: Mapping[str, float]) -> int:
    """How many trials run at a time on these resources."""
    whole = takes(config.finetune.workers)
    room = min(int(there.get(key, 0) / value) for key, value in whole.items())
    if not room:
        needs = ", ".join(f"{value:g} {key}" for key, value in whole.items())
        has = ", ".join(f"{there.get(key, 0):g} {key}" for key in whole)
        raise InfraError(
            "finetune.workers", f"a trial takes {needs}, the cluster has {has}", "Ask for less"
        )
    return min(room, config.concurrent or room)


# --- in the process of a trial ---------------------------------------------------------------


def _trial(chosen: Mapping[str, str], config: SweepConfig, parent: str | None) -> None:
    """Fine-tune with the settings of a trial.

    An error that its settings are to blame for is recorded, and the trial is not tried again. An
    error of the infrastructure is raised, and Tune starts the trial again.
    """
    name, trials = chosen["trial"], Trials(folder=config.folder / TRIALS)
    recipe = config.trial(name, trials.read(name).settings)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the driver prints progress
            finetune.execute(recipe, parent=parent, start=_start(recipe.workers))
    except Exception as error:
        why, code = explain(error, DATA_ERRORS)
        if code == InfraError.exit_code:
            raise
        trials.end(name, "failed", why)


def _start(workers: WorkersConfig) -> Callable[[Assignment], None]:
    """How to train. One process trains in the trial's own, which saves the start of another."""
    if workers.most == 1:
        return partial(worker.train, reports=tune.report)
    from ray.tune.integration.ray_train import TuneReportCallback

    return partial(launch.on_cluster, callbacks=[TuneReportCallback()])
