"""The objects through which Ray Tune runs a sweep: which trial is next, which goes on, and what is
recorded and said about them."""

from __future__ import annotations

import time
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from infra import tracking
from infra.command import explain
from infra.console import clock, say
from pipelines.runs import DATA_ERRORS
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
        """Nothing to do: results are read from the trial's directory."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to do: `Trials` is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to do."""


class Halving(FIFOScheduler):
    """Stops trials as `Asha.stops` decides, which also sees the validations before a restart."""

    def __init__(self, asha: Asha, steps: int, known: list[Trial]) -> None:
        super().__init__()
        self.asha, self.steps = asha, steps
        self.bounds = {t.name: [(v.step, v.bound) for v in t.validations] for t in known}

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
        bound = f", bound {found.bound:.4f}" if found.validations else ""
        say(f"{name}  {found.state} at step {found.step}{bound}  {found.why}".rstrip())

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        error = trial.get_error() or RuntimeError("its process died")
        self.trials.end(name, "lost", explain(error, DATA_ERRORS)[0].splitlines()[0])
        say(f"{name}  lost  {self.trials.read(name).why}")

    def _stopped(self, trial: Trial) -> None:
        """Record that ASHA stopped a trial; Tune ends its process next."""
        assert self.config.asha is not None
        rung = self.config.asha.rungs(trial.step + 1)[-1]
        why = f"not among the best 1/{self.config.asha.reduction} at step {rung}"
        self.trials.end(trial.name, "stopped", why)
        if handle := tracking.opened((self.trials.folder / trial.name).url):
            tracking.finish(handle, "KILLED", {"stopped_at": str(trial.step), "stopped_why": why})

    def _steps(self) -> int:
        return sum(trial.step for trial in self.trials.all())

    def _rest(self) -> str:
        """How many trials have ended and how, and the time that the rest takes at most."""
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
    """End the MLflow runs of trials that did not end by themselves."""
    for trial in trials.all():
        handle = tracking.opened((trials.folder / trial.name).url)
        if handle and trial.state in ("running", "lost"):
            tracking.finish(handle, "KILLED")
