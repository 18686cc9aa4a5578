"""How the settings of the next trial are found.

A proposal is a function of the space, the seed and the trials so far: a sweep that was killed
makes the proposals that it would have made, and no searcher needs a memory of its own.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipelines.sweeping.space import Choice, Settings, Space, label
from pipelines.sweeping.trials import SEED, Trial

if TYPE_CHECKING:
    import optuna

BASE = "base"
ATTEMPTS = 100  # at settings that no trial has had


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every combination of choices."""

    kind: Literal["grid"] = "grid"

    def require(self, space: Space) -> None:
        for key, knob in space.items():
            if not isinstance(knob, Choice):
                raise ValueError(f"a grid is of choices, and space.{key} is {knob.kind}")

    def count(self, space: Space) -> int:
        return len(self.planned(space, 0))

    def planned(self, space: Space, seed: int) -> list[Settings]:
        """All that will be proposed, in order."""
        values = (knob.probes for knob in space.values())
        return [dict(zip(space, row, strict=True)) for row in itertools.product(*values)]

    def propose(self, space: Space, seed: int, trials: Sequence[Trial]) -> Settings | None:
        """The settings of the next trial; None where there is none."""
        return _next(self.planned(space, seed), trials)


@dataclass(frozen=True, kw_only=True)
class Random:
    """Independent draws, no two of them equal."""

    trials: int = 12
    kind: Literal["random"] = "random"

    def require(self, space: Space) -> None:
        _positive(self.trials)

    def count(self, space: Space) -> int:
        return len(self.planned(space, 0))

    def planned(self, space: Space, seed: int) -> list[Settings]:
        different: dict[str, Settings] = {}
        for settings in itertools.islice(_draws(space, seed), ATTEMPTS * self.trials):
            different.setdefault(label(settings), settings)
            if len(different) == self.trials:
                break
        return list(different.values())

    def propose(self, space: Space, seed: int, trials: Sequence[Trial]) -> Settings | None:
        return _next(self.planned(space, seed), trials)


@dataclass(frozen=True, kw_only=True)
class Optuna:
    """A tree-structured Parzen estimator (optuna's TPESampler) over the trials so far."""

    trials: int = 12
    kind: Literal["optuna"] = "optuna"

    def require(self, space: Space) -> None:
        _positive(self.trials)

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
class OneAtATime:
    """`finetune` as it stands, the base, against itself with one knob at a time at another value.

    `arms` are further settings by name, of several knobs at once. Each arm is trained `repeats`
    times with other seeds, and the same ones as the base, so that differences are paired: data,
    noise and held-out rows are equal within a repeat.
    """

    repeats: int = 3
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    kind: Literal["one_at_a_time"] = "one_at_a_time"

    def require(self, space: Space) -> None:
        if self.repeats < 2:
            why = "differences need a spread, which takes two"
            raise ValueError(f"search.repeats must be at least 2, got {self.repeats}: {why}")
        for key, knob in space.items():
            if not isinstance(knob, Choice):
                raise ValueError(
                    f"search one_at_a_time is of choices, and space.{key} is {knob.kind}"
                )
        if BASE in self.arms:
            raise ValueError(f"search.arms.{BASE}: that is finetune as it stands, and there anyway")
        for name, settings in self.arms.items():
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

    def count(self, space: Space) -> int:
        return self.repeats * len(self.named(space))

    def planned(self, space: Space, seed: int) -> list[Settings]:
        """Repeat by repeat, so that whatever changes with time changes for all arms alike."""
        return [
            {**settings, SEED: seed + repeat}
            for repeat in range(self.repeats)
            for settings in self.named(space).values()
        ]

    def propose(self, space: Space, seed: int, trials: Sequence[Trial]) -> Settings | None:
        return _next(self.planned(space, seed), trials)


Search = Grid | Random | Optuna | OneAtATime


def study(space: Space, trials: Sequence[Trial], sampler: object = None) -> optuna.Study:
    """The trials as Optuna keeps them: what was stopped is pruned, what failed has failed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("optuna").setLevel(logging.WARNING)
    states = {
        "finished": optuna.trial.TrialState.COMPLETE,
        "stopped": optuna.trial.TrialState.PRUNED,
    }
    made = optuna.create_study(direction="minimize", sampler=sampler)
    for trial in trials:
        measured = trial.state in states and bool(trial.reports)
        made.add_trial(
            optuna.trial.create_trial(
                state=states[trial.state] if measured else optuna.trial.TrialState.FAIL,
                params={key: knob.internal(trial.settings[key]) for key, knob in space.items()},
                distributions={key: knob.distribution() for key, knob in space.items()},
                value=trial.bound if measured else None,
                intermediate_values={r.step: r.bound for r in trial.reports},
            )
        )
    return made


def _ask(space: Space, key: Sequence[int], trials: Sequence[Trial]) -> Settings:
    import optuna

    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    asked = study(space, trials, optuna.samplers.TPESampler(seed=seed, multivariate=True)).ask()
    return {name: knob.ask(asked, name) for name, knob in space.items()}


def _draws(space: Space, seed: int) -> Iterator[Settings]:
    for number in itertools.count():
        rng = np.random.default_rng([seed, number])
        yield {key: knob.draw(rng) for key, knob in space.items()}


def _next(planned: Sequence[Settings], trials: Sequence[Trial]) -> Settings | None:
    return planned[len(trials)] if len(trials) < len(planned) else None


def _positive(trials: int) -> None:
    if trials < 1:
        raise ValueError(f"search.trials must be at least 1, got {trials}")
