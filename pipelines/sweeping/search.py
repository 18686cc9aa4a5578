"""Searches: how the settings of the next trial are chosen.

A proposal is a function of the space, the seed and the trials so far. A sweep that was killed
therefore goes on with the same proposals, and a search keeps no state.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from infra.config import at_least
from pipelines.sweeping.space import Choice, Settings, Space, label
from pipelines.sweeping.trials import SEED, Trial

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

BASE = "base"
ATTEMPTS = 100  # draws for each trial, until its settings are new


class Planned(ABC):
    """A search whose proposals are all known before it begins."""

    @abstractmethod
    def planned(self, space: Space, seed: int) -> list[Settings]:
        """All proposals, in order."""

    def count(self, space: Space) -> int:
        return len(self.planned(space, 0))

    def propose(self, space: Space, seed: int, trials: Sequence[Trial]) -> Settings | None:
        """The settings of the next trial; None where there is none."""
        had = {label(trial.settings) for trial in trials}
        left = (settings for settings in self.planned(space, seed) if label(settings) not in had)
        return next(left, None)


@dataclass(frozen=True, kw_only=True)
class Grid(Planned):
    """Every combination of choices."""

    kind: Literal["grid"] = "grid"

    def require(self, space: Space) -> None:
        _require_choices(self.kind, space)

    def planned(self, space: Space, seed: int) -> list[Settings]:
        values = (knob.probes for knob in space.values())
        return [dict(zip(space, row, strict=True)) for row in itertools.product(*values)]


@dataclass(frozen=True, kw_only=True)
class Random(Planned):
    """Independent draws, no two of them equal."""

    trials: int = 12
    kind: Literal["random"] = "random"

    def __post_init__(self) -> None:
        at_least(1, self, "trials")

    def require(self, space: Space) -> None:
        """Any space will do."""

    def planned(self, space: Space, seed: int) -> list[Settings]:
        different: dict[str, Settings] = {}
        for number in range(ATTEMPTS * self.trials):
            rng = np.random.default_rng([seed, number])
            settings = {key: knob.draw(rng) for key, knob in space.items()}
            different.setdefault(label(settings), settings)
            if len(different) == self.trials:
                break
        return list(different.values())


@dataclass(frozen=True, kw_only=True)
class Optuna:
    """A tree-structured Parzen estimator (optuna's TPESampler) over the trials so far."""

    trials: int = 12
    kind: Literal["optuna"] = "optuna"

    def __post_init__(self) -> None:
        at_least(1, self, "trials")

    def require(self, space: Space) -> None:
        """Any space will do."""

    def count(self, space: Space) -> int:
        return self.trials

    def planned(self, space: Space, seed: int) -> list[Settings]:
        return []

    def propose(self, space: Space, seed: int, trials: Sequence[Trial]) -> Settings | None:
        if len(trials) >= self.trials:
            return None
        had = {label(trial.settings) for trial in trials}
        for attempt in range(ATTEMPTS):
            settings = _ask(space, [seed, len(trials), attempt], trials)
            if label(settings) not in had:
                return settings
        return None


@dataclass(frozen=True, kw_only=True)
class OneAtATime(Planned):
    """`finetune` as it stands (the base) against variants that differ in the value of one knob.

    `arms` are further variants by name, which may change several knobs. The base and each variant
    are trained `repeats` times, with the same seeds, so that differences are paired: data, noise
    and held-out rows are equal within a repeat.
    """

    repeats: int = 3
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    kind: Literal["one_at_a_time"] = "one_at_a_time"

    def require(self, space: Space) -> None:
        if self.repeats < 2:
            why = "differences need a spread, which takes two"
            raise ValueError(f"search.repeats must be at least 2, got {self.repeats}: {why}")
        _require_choices(self.kind, space)
        for name, settings in self.arms.items():
            if name == BASE:
                raise ValueError(f"search.arms.{BASE}: this is the name of finetune as it stands")
            if name.partition("=")[0] in space:
                raise ValueError(f"search.arms.{name}: the reports would take it for the knob")
            for key in settings:
                if key not in space:
                    raise ValueError(f"search.arms.{name}.{key} is no knob of the space")

    def named(self, space: Space) -> dict[str, Settings]:
        """What each arm replaces of the base, which is the first of them."""
        single = {
            f"{key}={label(value)}": {key: value}
            for key, knob in space.items()
            for value in knob.probes
        }
        return {BASE: {}, **single, **self.arms}

    def planned(self, space: Space, seed: int) -> list[Settings]:
        """Repeat by repeat, so that whatever changes with time changes for all arms alike."""
        return [
            {**settings, SEED: seed + repeat}
            for repeat in range(self.repeats)
            for settings in self.named(space).values()
        ]


Search = Grid | Random | Optuna | OneAtATime


def study(space: Space, trials: Sequence[Trial], sampler: object = None) -> optuna.Study:
    """The trials as an Optuna study, in which stopped trials are pruned."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("optuna").setLevel(logging.WARNING)
    states = {
        "finished": optuna.trial.TrialState.COMPLETE,
        "stopped": optuna.trial.TrialState.PRUNED,
    }
    made = optuna.create_study(direction="minimize", sampler=sampler)
    for trial in trials:
        measured = trial.state in states and bool(trial.validations)
        made.add_trial(
            optuna.trial.create_trial(
                state=states[trial.state] if measured else optuna.trial.TrialState.FAIL,
                params={key: knob.to_optuna(trial.settings[key]) for key, knob in space.items()},
                distributions=_distributions(space),
                value=trial.bound if measured else None,
                intermediate_values={r.step: r.bound for r in trial.validations},
            )
        )
    return made


def _ask(space: Space, key: Sequence[int], trials: Sequence[Trial]) -> Settings:
    import optuna

    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    asked = study(space, trials, sampler).ask(_distributions(space))
    return {name: knob.from_optuna(asked.params[name]) for name, knob in space.items()}


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    return {key: knob.distribution() for key, knob in space.items()}


def _require_choices(kind: str, space: Space) -> None:
    for key, knob in space.items():
        if not isinstance(knob, Choice):
            raise ValueError(f"search {kind} is of choices, and space.{key} is {knob.kind}")
