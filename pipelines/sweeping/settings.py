"""The configuration of `sweep`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Any, Literal

import numpy as np

from infra import tracking
from infra.config import at_least, overridden, to_tree
from infra.errors import ConfigError
from pipelines.evaluation.cells import PathConfig
from pipelines.evaluation.questions.frontier import Frontier
from pipelines.evaluation.settings import EvaluateConfig, Questions
from pipelines.finetune import FinetuneConfig, Recipe
from pipelines.sweeping.search import OneAtATime, Random, Search
from pipelines.sweeping.space import Knob, Settings, label
from pipelines.sweeping.trials import SEED
from pipelines.verb import RunSettings, TrackingConfig, require_model_name

TRIALS, SECOND, CELLS = "trials", "second", "cells"
Bounds = Sequence[tuple[int, float]]  # (step, bound) of the validations of a trial, in order
# What decides how trials are measured, how long and where they run is the same for all of them.
COMMON = (
    "train.stream", "train.steps", "train.validate_every", "train.validation_microbatches",
    "train.bound_samples", "workers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asha:
    """Asynchronous successive halving (arXiv 1810.05934).

    At `grace` steps and each time `reduction` times as many (the rungs), a trial goes on if its
    bound is among the best 1 / `reduction` of the trials that were there before it.
    """

    grace: int
    reduction: int = 3

    def __post_init__(self) -> None:
        at_least(1, self, "grace")
        at_least(2, self, "reduction")

    def rungs(self, steps: int) -> list[int]:
        """The steps below `steps` at which trials are stopped."""
        found, rung = [], self.grace
        while rung < steps:
            found.append(rung)
            rung *= self.reduction
        return found

    def stops(self, own: Bounds, others: Iterable[Bounds], steps: int) -> bool:
        """Whether a trial of `steps` steps is stopped after the last of its `own` validations.

        It is judged once at each rung, by the first validation there, against the first of each
        other trial that has reached the rung. One without a finite bound there is stopped. No trial
        is stopped when it has trained to the end.
        """
        *before, (step, bound) = own
        rung = max((rung for rung in self.rungs(steps) if rung <= step), default=None)
        if rung is None or step >= steps or any(earlier >= rung for earlier, _ in before):
            return False
        first = (next((bound for step, bound in other if step >= rung), None) for other in others)
        there = [bound for bound in first if bound is not None and math.isfinite(bound)]
        # In the form of Ray's own rule, so that equal bounds are judged alike, to the last bit; and
        # so that a NaN, which is not >= anything, stops.
        share = (1 - 1 / self.reduction) * 100
        return bool(there) and not -bound >= np.percentile(np.negative(there), share)


@dataclass(frozen=True, kw_only=True)
class Select:
    """What chooses among the trials of the second level instead of their bounds: the key of a
    `merit` in the tables of its report, such as `headline_judge`, at its best on any walk of at
    most `calls` denoiser calls, or of any number of them. Where no walk has it, bounds choose."""

    merit: str
    calls: int | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "calls")


@dataclass(frozen=True, kw_only=True)
class SecondConfig(Questions):
    """The second level, which needs no training: paths, splits, SNR at the hand-over, eta, nucleus.

    The models of the `keep` trials of the lowest bounds walk all `paths`. The one of the lowest
    bound is recommended, or the one that `select` says. The other settings are those of `evaluate`.
    """

    paths: dict[str, PathConfig]
    keep: int = 3
    select: Select | None = None
    split: Literal["validation", "test"] = "validation"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "keep")
        if self.select:
            self._require_measured(self.select)

    def _require_measured(self, select: Select) -> None:
        """ValueError for a merit that no walk can have."""
        of = {m.key: q for q in self.questions for m in q.merits_in(self) if m.better}
        if select.merit not in of:
            raise ValueError(f"select.merit is one of {', '.join(of)}, got {select.merit}")
        names, calls = tuple(self.paths), ()
        if isinstance(of[select.merit], Frontier):
            if self.frontier.nuclei:
                why = "with them a walk has several headlines, of which none can be selected"
                raise ValueError(f"frontier.nuclei: {why}; give the paths a nucleus instead")
            names, calls = self.frontier.paths or names, self.frontier.budgets
        # A path without budgets takes a call for each token, of which there may be one.
        walks = (walk for name in names for walk in self.paths[name].walks(1))
        least = min(calls or (budget for _, budget in walks), default=0)
        if select.calls and select.calls < least:
            raise ValueError(f"select.calls is {select.calls}, and walks that have it take {least}")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(RunSettings):
    """Each trial is `finetune` with some settings replaced by values from `space`, whose keys are
    dotted keys of `finetune`.

    `concurrent` is the number of trials at a time, by default as many as the cluster has room for
    when the sweep begins. A cluster that grows only on demand needs it.
    `register` is the name of the best model in the registry. `seed` is that of the search; one knob
    at a time, it is also the seed of the first repeat.
    """

    data: str
    finetune: Recipe
    space: dict[str, Knob]
    search: Search = field(default_factory=Random)
    asha: Asha | None = None
    second: SecondConfig | None = None
    register: str | None = None
    seed: int = 0
    concurrent: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_model_name(self.register)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in [0, 2^63), got {self.seed}")
        if not self.space:
            raise ValueError("space must hold at least one knob")
        at_least(1, self, "concurrent")
        if self.asha and not self.judged_at:
            train = self.finetune.train
            why = f"no validation from there on is before the last of the {train.steps} steps"
            fix = f"Lower it, or finetune.train.validate_every ({train.validate_every})"
            raise ConfigError("asha.grace", f"{self.asha.grace}, and {why}", fix)
        for key in self.space:
            for common in COMMON:
                if f"{key}.".startswith(f"{common}.") or common.startswith(f"{key}."):
                    why = f"trials that differ in {common} could not be compared"
                    raise ConfigError(f"space.{key}", why, f"Set finetune.{common} for all of them")
            if inner := [other for other in self.space if other.startswith(f"{key}.")]:
                raise ConfigError(f"space.{inner[0]}", f"a knob inside of {key}", "Keep one")
        for key, knob in self.space.items():
            self._require_different([{key: value} for value in knob.probes])
        self.search.require(self.space)
        if isinstance(self.search, OneAtATime):
            if self.asha:
                why = "arms that are stopped early cannot be set against the base"
                raise ConfigError("asha", why, "Leave it out, or set it to null")
            if self.finetune.train.stream.seed not in (0, self.seed):
                why = "the repeats have seeds of their own: `seed` of the sweep, and those after it"
                raise ConfigError(f"finetune.{SEED}", why, "Set `seed` instead")
        self._require_different(self.search.planned(self.space, self.seed))

    @property
    def shown(self) -> TrackingConfig:
        """The MLflow server of all runs of the sweep, whatever folder they are in."""
        uri = tracking.locate(self.tracking, self.root)
        return TrackingConfig(uri=uri, experiment=self.tracking.experiment)

    @property
    def judged_at(self) -> list[int]:
        """The steps at which trials may be stopped: the first validation from each rung on."""
        train = self.finetune.train
        steps, every = train.steps, train.validate_every
        rungs = self.asha.rungs(steps) if self.asha else ()
        found = dict.fromkeys(math.ceil(rung / every) * every for rung in rungs)
        return [step for step in found if step < steps]

    def recipe(self, settings: Settings) -> Recipe:
        """The recipe of a trial; ConfigError for an unknown key or an impossible value."""
        return overridden(self.finetune, settings, "space")

    def own(self, key: str) -> Any:
        """The value of a knob in `finetune` as it stands; None inside of a section that is None."""
        whole = to_tree(self.finetune)
        return reduce(lambda tree, name: tree and tree[name], key.split("."), whole)

    def _require_different(self, trials: Sequence[Settings]) -> None:
        """ConfigError for impossible settings, and for two that make the same recipe."""
        had: dict[str, Settings] = {}
        for settings in trials:
            other = had.setdefault(label(to_tree(self.recipe(settings))), settings)
            if other is not settings:
                raise ConfigError(
                    "space",
                    f"{label(settings)} makes the same recipe as {label(other)}",
                    "A section only replaces what it names of the one in finetune: name all of it, "
                    "or leave out what finetune has already",
                )

    def trial(self, name: str, settings: Settings) -> FinetuneConfig:
        return FinetuneConfig(
            name=name,
            data=self.data,
            root=(self.folder / TRIALS).url,
            tracking=self.shown,
            **vars(self.recipe(settings)),
        )

    def evaluation(self, models: Mapping[str, str]) -> EvaluateConfig:
        """The second level, of models by name."""
        assert self.second is not None
        asked: dict[str, Any] = {f.name: getattr(self.second, f.name) for f in fields(Questions)}
        return EvaluateConfig(
            name=SECOND,
            data=self.data,
            root=self.folder.url,
            models=dict(models),
            tracking=self.shown,
            trust_remote_code=self.finetune.trust_remote_code,
            **asked,
        )
