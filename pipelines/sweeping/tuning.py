"""Ray Tune: runs trials side by side, stops the bad ones, and keeps nothing that would be missed.

Tune is told of earlier trials by the run directories (see `pipelines.sweeping.trials`), so a sweep
that was killed goes on whatever has become of its cluster.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher

from infra import cluster, stream, tracking
from infra.cluster import DATA_CPUS
from infra.command import explain
from infra.errors import InfraError
from pipelines import finetune, launch
from pipelines.launch import Job, WorkersConfig
from pipelines.runs import DATA_ERRORS, clock, say
from pipelines.sweeping.settings import TRIALS, Asha, SweepConfig
from pipelines.sweeping.trials import BOUND, Trial, Trials

QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journals have it all
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one ignores `verbose`
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would swallow a Ctrl-C
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "TUNE_WARN_THRESHOLD_S": "60",
}


def run(config: SweepConfig, parent: str | None) -> None:
    """Run every trial that is missing, from wherever it is, to its end.

    parent: id of the MLflow run of the sweep.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    trials, workers = Trials(folder=config.folder / TRIALS), config.finetune.workers
    needed = int(takes(workers)["CPU"]) - DATA_CPUS  # which are added
    place = tempfile.mkdtemp(prefix="ray-tune-")
    try:
        with cluster.connected(workers.cluster, needed_cpus=needed):
            room = concurrent(config, ray.cluster_resources())
            trainable = tune.with_parameters(_trial, config=config, parent=parent)
            tune.Tuner(
                tune.with_resources(trainable, reserved(workers)),
                tune_config=tune.TuneConfig(
                    num_samples=-1,  # as many as are proposed
                    search_alg=Proposals(config, trials),
                    scheduler=_scheduler(config, trials),
                    max_concurrent_trials=room,
                ),
                run_config=tune.RunConfig(
                    name=f"{config.name}-{secrets.token_hex(4)}",
                    storage_path=place,
                    verbose=0,
                    callbacks=[Watch(config, trials)],
                    failure_config=tune.FailureConfig(max_failures=workers.max_failures),
                ),
            ).fit()
    finally:
        shutil.rmtree(place, ignore_errors=True)
        _close(trials)


def reserved(workers: WorkersConfig) -> dict[str, float]:
    """What Tune reserves for a trial's own process, which is the one that trains if there is but
    one; several workers reserve for themselves."""
    if workers.count > 1:
        return {"CPU": 1.0}
    return {**workers.resources, "CPU": float(workers.parallel.threads or 1)}


def takes(workers: WorkersConfig) -> dict[str, float]:
    """All that a trial takes. One process reads its own rows; Ray's tasks read those of several."""
    own = reserved(workers)
    if workers.count == 1:
        return own
    whole = {key: workers.count * value for key, value in workers.resources.items()}
    return {**whole, "CPU": whole["CPU"] + own["CPU"] + DATA_CPUS}


def concurrent(config: SweepConfig, there: Mapping[str, float]) -> int:
    """How many trials run at a time, of what resources there are."""
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
    """Fine-tune as one trial does. What its settings are to blame for ends it for good; anything
    else is raised, and Tune starts it again."""
    name, trials = chosen["trial"], Trials(folder=config.folder / TRIALS)
    recipe = config.trial(name, trials.read(name).settings)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the driver tells of all trials
            finetune.execute(recipe, parent=parent, fit=_fit(recipe.workers))
    except Exception as error:
        why, code = explain(error, DATA_ERRORS)
        if code == InfraError.exit_code:
            raise
        trials.end(name, "failed", why)


def _fit(workers: WorkersConfig) -> Callable[[Job], None]:
    """One process trains in the trial's own, which saves the start of another."""
    if workers.count == 1:
        return partial(launch.run_on_this_process, batches=stream.read, report=tune.report)
    from ray.tune.integration.ray_train import TuneReportCallback

    return partial(launch.fit_on_cluster, callbacks=[TuneReportCallback()])


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
        config, known = self.config, self.trials.all()
        settings = config.search.propose(config.space, config.seed, known)
        if settings is None:
            return Searcher.FINISHED
        return {"trial": self.trials.add(len(known), settings)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The trial's directory has it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is kept."""


class _Named(NamedTuple):
    """A trial under the name of its run directory, which outlives Tune's own."""

    trial_id: str

    @classmethod
    def of(cls, trial: Any) -> _Named:
        return cls(trial.config["trial"])


class Halving(ASHAScheduler):
    """Ray's ASHA with the memory of a sweep: what earlier trials reported counts, and what has
    been let through a rung is not judged there again."""

    def __init__(self, asha: Asha, steps: int, known: list[Trial]) -> None:
        super().__init__(
            time_attr="step",
            metric=BOUND,
            mode="min",
            max_t=steps,
            grace_period=asha.grace,
            reduction_factor=asha.reduction,
            stop_last_trials=False,
        )
        self.steps = steps
        for trial in known:
            named = _Named(trial.name)
            super().on_trial_add(None, named)
            for report in trial.reports:
                super().on_trial_result(None, named, {"step": report.step, BOUND: report.bound})

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        super().on_trial_add(controller, _Named.of(trial))

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result["step"] >= self.steps:
            return self.CONTINUE  # only the model is left to be written
        return super().on_trial_result(controller, _Named.of(trial), result)

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """All that it said has been heard."""

    def on_trial_remove(self, controller: Any, trial: Any) -> None:
        """A trial that is gone has said what it has said."""


def _scheduler(config: SweepConfig, trials: Trials) -> FIFOScheduler:
    if config.asha is None:
        return FIFOScheduler()
    return Halving(config.asha, config.finetune.train.steps, trials.all())


class Watch(tune.Callback):
    """Says how trials fare, and records how they ended."""

    def __init__(self, config: SweepConfig, trials: Trials) -> None:
        self.config, self.trials = config, trials
        self.count = config.search.count(config.space)
        self.began, self.first = time.monotonic(), self._steps()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if BOUND in result:
            name, total = trial.config["trial"], self.config.finetune.train.steps
            say(f"{name}  step {result['step']}/{total}  bound {result[BOUND]:.4f}{self._rest()}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        found = self.trials.read(name)
        if found.state == "running":
            self._stopped(found)
            found = self.trials.read(name)
        bound = f", bound {found.bound:.4f}" if found.reports else ""
        say(f"{name}  {found.state} at step {found.step}{bound}  {found.why}".rstrip())

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        error = trial.get_error() or RuntimeError("its process died")
        self.trials.end(name, "lost", explain(error, DATA_ERRORS)[0].splitlines()[0])
        say(f"{name}  lost  {self.trials.read(name).why}")

    def _stopped(self, trial: Trial) -> None:
        """Tune has halted it in its report, and ends its process next."""
        assert self.config.asha is not None
        rung = self.config.asha.rungs(trial.step + 1)[-1]
        why = f"not among the best 1/{self.config.asha.reduction} at step {rung}"
        self.trials.end(trial.name, "stopped", why)
        if handle := tracking.opened((self.trials.folder / trial.name).url):
            tracking.finish(handle, "KILLED", {"stopped_at": str(trial.step), "stopped_why": why})

    def _steps(self) -> int:
        return sum(trial.step for trial in self.trials.all())

    def _rest(self) -> str:
        """How many trials have ended and how, and how long all steps of the rest would take."""
        known = self.trials.all()
        states = [trial.state for trial in known]
        ended = "".join(
            f"  {states.count(state)} {state}"
            for state in ("finished", "stopped", "failed", "lost")
            if state in states
        )
        steps = self.config.finetune.train.steps
        left = steps * (self.count - len(known))
        left += sum(steps - trial.step for trial in known if trial.state == "running")
        done = max(sum(trial.step for trial in known) - self.first, 1)
        eta = left * (time.monotonic() - self.began) / done
        return f"  of {self.count}:{ended or '  none ended'}  ETA at most {clock(eta)}"


def _close(trials: Trials) -> None:
    """End the MLflow runs of trials that were interrupted with the sweep."""
    for trial in trials.all():
        handle = tracking.opened((trials.folder / trial.name).url)
        if handle and trial.state in ("running", "lost"):
            tracking.finish(handle, "KILLED")
