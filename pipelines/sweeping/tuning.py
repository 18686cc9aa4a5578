"""Runs the trials of a sweep side by side with Ray Tune: which trial is next, which goes on, and
what is recorded and said about them.

Earlier trials are read from their run directories (see `pipelines.sweeping.trials`) and not from
Tune's own state, so a sweep that was killed goes on even on another cluster.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from infra import cluster, tracking
from infra.cluster import DATA_CPUS
from infra.command import explain
from infra.console import line, progress, say
from infra.errors import InfraError, Problem
from pipelines import finetune
from pipelines.models import DATA_ERRORS
from pipelines.sweeping.settings import TRIALS, Asha, SweepConfig
from pipelines.sweeping.trials import BOUND, Trial, Trials
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
    """How many trials run at a time: as many as the configuration says, for which a cluster may
    have to grow first, else as many as these resources have room for."""
    if config.concurrent:
        return config.concurrent
    whole = takes(config.finetune.workers)
    room = min(int(there.get(key, 0) / value) for key, value in whole.items())
    if not room:
        needs = ", ".join(f"{value:g} {key}" for key, value in whole.items())
        has = ", ".join(f"{there.get(key, 0):g} {key}" for key in whole)
        raise InfraError(
            "finetune.workers",
            f"a trial takes {needs}, the cluster has {has}",
            "Ask for less, or set `concurrent` if the cluster grows",
        )
    return room


# --- in the driver ---------------------------------------------------------------------------


class Proposals(Searcher):
    """Trials that were interrupted first, then what the search proposes."""

    def __init__(self, config: SweepConfig, trials: Trials) -> None:
        super().__init__(metric=BOUND, mode="min")
        self.config, self.trials = config, trials
        self.left = [t.name for t in trials.all() if t.state in ("running", "lost")]

    def suggest(self, trial_id: str) -> dict[str, str] | str:
        if self.left:
            name = self.left.pop(0)
            self.trials.end(name, "running", "")
            return {"trial": name}
        config = self.config
        settings = config.search.propose(config.space, config.seed, self.trials.all())
        if settings is None:
            return Searcher.FINISHED
        return {"trial": self.trials.add(self.trials.free(), settings)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing to do: results are read from the trial's directory."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to do: `Trials` is the state."""


class Halving(FIFOScheduler):
    """Stops trials as `Asha.stops` decides, which also sees the validations before a restart."""

    def __init__(self, asha: Asha, steps: int, known: list[Trial]) -> None:
        super().__init__()
        self.asha, self.steps = asha, steps
        self.bounds = {t.name: [(v.step, v.bound) for v in t.validations] for t in known}
        for trial in known:
            # It may have been interrupted before its last validation was judged.
            if trial.state in ("running", "lost"):
                del self.bounds[trial.name][-1:]

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if BOUND not in result:
            return self.CONTINUE
        name = trial.config["trial"]  # Tune's own id does not outlive this process
        own = self.bounds.setdefault(name, [])
        own.append((result["step"], result[BOUND]))
        others = [bounds for other, bounds in self.bounds.items() if other != name]
        return self.STOP if self.asha.stops(own, others, self.steps) else self.CONTINUE


def scheduler(config: SweepConfig, trials: Trials) -> FIFOScheduler:
    if config.asha is None:
        return FIFOScheduler()
    return Halving(config.asha, config.finetune.train.steps, trials.all())


class SweepCallback(tune.Callback):
    """Prints the progress of the trials, and records how each ended."""

    def __init__(self, config: SweepConfig, trials: Trials) -> None:
        self.config, self.trials = config, trials
        self.count = config.search.count(config.space)
        # Read once: this runs in Tune's own loop, for which the store would be too slow.
        known = trials.all()
        self.steps = {trial.name: trial.step for trial in known}
        self.ended = {t.name for t in known if t.state not in ("running", "lost")}
        self.began, self.first = time.monotonic(), sum(self.steps.values())

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if BOUND in result:
            name, step = trial.config["trial"], result["step"]
            self.steps[name] = step
            self._show(f"{name} at step {step}", result[BOUND])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        self.ended.add(name)
        found = self.trials.read(name)
        if found.state == "running":
            self._stopped(found, trial.last_result)
            found = self.trials.read(name)
        bound = f", bound {found.bound:.4f}" if found.validations else ""
        say(f"{name}  {found.state} at step {found.step}{bound}  {found.why}".rstrip())

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        self.ended.add(name)
        if self.trials.read(name).state == "running":
            self.trials.end(name, "lost", "its process died")
        say(f"{name}  lost  {self.trials.read(name).why}")

    def _stopped(self, trial: Trial, result: Mapping[str, Any]) -> None:
        """Record that ASHA stopped a trial; Tune ends its process next."""
        assert self.config.asha is not None
        rung = self.config.asha.rungs(result["step"] + 1)[-1]
        why = f"not among the best 1/{self.config.asha.reduction}"
        why = why if math.isfinite(result[BOUND]) else "no finite bound"
        self.trials.end(trial.name, "stopped", f"{why} at step {rung}")
        _close(self.trials, self.trials.read(trial.name))

    def _show(self, trial: str, bound: float) -> None:
        """A line of progress. The rest takes at most the time that it says: trials may be
        stopped."""
        steps = self.config.finetune.train.steps
        left = steps * (self.count - len(self.steps.keys() | self.ended))
        left += sum(steps - at for name, at in self.steps.items() if name not in self.ended)
        done = max(sum(self.steps.values()) - self.first, 1)
        elapsed = max(time.monotonic() - self.began, 1e-9)
        facts = trial, f"bound {bound:.4f}"
        rate, what = f"{done / elapsed:,.1f} steps/s", f"sweep {self.config.name}"
        eta_s = left * elapsed / done
        progress(line(what, len(self.ended), self.count, "trials", *facts, rate=rate, eta_s=eta_s))


def close(trials: Trials) -> None:
    """End the MLflow runs of trials that did not end by themselves, once no process of theirs is
    left: one that was stopped may have logged again since its run was closed, and so opened it."""
    for trial in trials.all():
        if trial.state in ("running", "lost", "stopped"):
            _close(trials, trial)


def _close(trials: Trials, trial: Trial) -> None:
    tags = {"stopped_at": str(trial.step), "stopped_why": trial.why}
    if handle := tracking.opened((trials.folder / trial.name).url):
        tracking.finish(handle, "KILLED", tags if trial.state == "stopped" else {})


# --- in the process of a trial ---------------------------------------------------------------


def _trial(chosen: Mapping[str, str], config: SweepConfig, parent: str | None) -> None:
    """Fine-tune with the settings of a trial.

    An error that its settings are to blame for is recorded, and the trial is not tried again. An
    error of the infrastructure is raised as well, and Tune starts the trial again. Tune does not
    tell the driver in time which error it was.
    """
    name, trials = chosen["trial"], Trials(folder=config.folder / TRIALS)
    trials.end(name, "running", "")
    try:
        recipe = config.trial(name, trials.read(name).settings)
        with contextlib.redirect_stderr(io.StringIO()):  # the driver prints progress
            finetune.execute(recipe, parent=parent, start=_start(recipe.workers))
    except Exception as error:
        why, code = explain(error, DATA_ERRORS)
        if code != InfraError.exit_code:
            trials.end(name, "failed", why)
            return
        with contextlib.suppress(Problem):  # it may be the store that is away
            trials.end(name, "lost", why)
        raise


def _start(workers: WorkersConfig) -> Callable[[Assignment], None]:
    """How to train. One process trains in the trial's own, which saves the start of another."""
    if workers.most == 1:
        return partial(worker.train, reports=tune.report)
    from ray.tune.integration.ray_train import TuneReportCallback

    return partial(launch.on_cluster, callbacks=[TuneReportCallback()])
