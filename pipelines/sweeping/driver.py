"""What Ray Tune asks of the driver: which trial is next, which goes on, and what to tell of it."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher

from infra import tracking
from infra.command import explain
from pipelines.runs import DATA_ERRORS, clock, say
from pipelines.sweeping.settings import Asha, SweepConfig
from pipelines.sweeping.trials import BOUND, Trial, Trials


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


def scheduler(config: SweepConfig, trials: Trials) -> FIFOScheduler:
    """What judges reports."""
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


def close(trials: Trials) -> None:
    """End the MLflow runs of trials that were interrupted with the sweep."""
    for trial in trials.all():
        handle = tracking.opened((trials.folder / trial.name).url)
        if handle and trial.state in ("running", "lost"):
            tracking.finish(handle, "KILLED")
