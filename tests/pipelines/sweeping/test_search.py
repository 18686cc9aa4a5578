"""Spaces and searches: what is proposed, that it is possible, and that a restart proposes the
same; and the sweeps that are shipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.config import load
from infra.errors import ConfigError
from pipelines.sweeping.search import Grid, Optuna, Random, study
from pipelines.sweeping.settings import SweepConfig
from pipelines.sweeping.space import Choice, Knob, LogUniform, Uniform, label, titles
from pipelines.sweeping.trials import Trial
from tests.pipelines import tiny
from tests.pipelines.sweeping import small

SPACE: dict[str, Knob] = {
    "converter.beta": LogUniform(low=0.1, high=10.0),
    "converter.embed_dim": Uniform(low=4, high=8),
    "support": Choice(values=({"kind": "roar"}, {"kind": "lognormal", "mu": 1.0})),
}


def bowl(settings: dict[str, object]) -> float:
    """Best at beta 1, and with the second support."""
    beta, support = settings["converter.beta"], settings["support"]
    assert isinstance(beta, float)
    return math.log10(beta) ** 2 + (support == {"kind": "roar"})


@given(
    st.floats(1e-6, 1e3), st.floats(1.01, 1e4), st.integers(0, 2**32 - 1), st.sampled_from([1, 0])
)
def test_a_range_gives_what_lies_in_it(low: float, ratio: float, seed: int, whole: int) -> None:
    high = low * ratio
    if whole:
        low, high = max(1, round(low)), max(1, round(low)) + max(1, round(ratio))
    for knob in (Uniform(low=low, high=high), LogUniform(low=low, high=high)):
        value = knob.draw(np.random.default_rng(seed))
        assert low <= value <= high
        assert isinstance(value, int if whole else float)


def test_a_logarithmic_range_is_even_in_the_logarithm() -> None:
    rng = np.random.default_rng(0)
    knob = LogUniform(low=1e-4, high=1.0)
    draws = [math.log10(knob.draw(rng)) for _ in range(4000)]
    counts, _ = np.histogram(draws, bins=4, range=(-4, 0))
    assert counts.min() > 900


def test_a_grid_is_every_combination_once() -> None:
    space: dict[str, Knob] = {"a": Choice(values=(1, 2, 3)), "b": Choice(values=(None, {"x": 1}))}
    planned = Grid().planned(space, 0)
    assert len({label(settings) for settings in planned}) == Grid().count(space) == 6
    assert planned[0] == {"a": 1, "b": None}


def test_titles_of_knobs_are_short_and_never_the_same() -> None:
    keys = ["support.roar.gamma_max", "support.continuous.gamma_max", "init", "support.roar.c"]
    assert list(titles(keys).values()) == ["roar.gamma_max", "continuous.gamma_max", "init", "c"]
    assert titles(["support", "a.support"]) == {"support": "support", "a.support": "a.support"}


def test_random_draws_differ_and_more_of_them_begin_alike() -> None:
    few, many = Random(trials=5).planned(SPACE, 7), Random(trials=20).planned(SPACE, 7)
    assert many[:5] == few
    assert len({label(settings) for settings in many}) == 20
    assert Random(trials=5).planned(SPACE, 8) != few


def test_a_small_space_is_not_drawn_from_twice() -> None:
    space: dict[str, Knob] = {"a": Choice(values=(1, 2)), "b": Uniform(low=1, high=2)}
    assert Random(trials=99).count(space) == 4
    trials: list[Trial] = []
    search = Optuna(trials=9)
    while settings := search.propose(space, 0, trials):
        trials.append(small.trial(len(trials), dict(settings), "finished", 1.0))
    assert len(trials) == 4


@pytest.mark.parametrize("search", [Random(trials=24), Optuna(trials=24)])
def test_proposals_are_a_function_of_what_is_there(search: Random | Optuna) -> None:
    """A restart in the middle goes on as if nothing had been."""

    def run(trials: list[Trial]) -> list[Trial]:
        trials = list(trials)
        while (settings := search.propose(SPACE, 3, trials)) is not None:
            trials.append(small.trial(len(trials), dict(settings), "finished", bowl(settings)))
        return trials

    whole = run([])
    assert len(whole) == 24
    assert run(whole[:13]) == whole


def test_optuna_learns_where_it_is_good() -> None:
    """Better than chance, over the same number of trials."""

    def last(search: Random | Optuna) -> float:
        trials: list[Trial] = []
        while (settings := search.propose(SPACE, 0, trials)) is not None:
            trials.append(small.trial(len(trials), dict(settings), "finished", bowl(settings)))
        return float(np.mean([trial.bound for trial in trials[-12:]]))

    assert last(Optuna(trials=40)) < 0.6 * last(Random(trials=40))


def test_optuna_hears_how_trials_ended() -> None:
    settings = {
        "converter.beta": 1.0,
        "converter.embed_dim": 8,
        "support": {"kind": "lognormal", "mu": 1.0},
    }
    trials = [
        small.trial(0, settings, "finished", 3.0, 2.0),
        small.trial(1, settings, "stopped", 4.0),
        small.trial(2, settings, "failed"),
        small.trial(3, settings, "running", 5.0),
    ]
    told = study(SPACE, trials).trials
    assert [t.state.name for t in told] == ["COMPLETE", "PRUNED", "FAIL", "FAIL"]
    assert told[0].value == 2.0
    assert told[1].intermediate_values == {10: 4.0}
    assert told[0].params["support"] == '{"kind": "lognormal", "mu": 1.0}'


@pytest.mark.parametrize(
    ("space", "where"),
    [
        ("converter.betta: {kind: uniform, low: 1, high: 2}", r"converter\.betta"),
        ("support.roar_share: {kind: uniform, low: 0, high: 2}", "roar_share"),
        ("converter.embed_dim: {kind: choice, values: [8, wide]}", "embed_dim"),
        ("support: {kind: choice, values: [roar, {kind: lognormal, sigma: -1}]}", "sigma"),
        # A knob inside of another.
        (
            "support: {kind: choice, values: [roar]}, "
            "support.roar_share: {kind: choice, values: [0.5]}",
            r"space\.support\.roar_share",
        ),
        # Each value is possible by itself, and one pair of them is not.
        (
            "support.roar.gamma_min: {kind: choice, values: [0, 20]}, "
            "support.roar.gamma_max: {kind: choice, values: [10, 30]}",
            "gamma_max must be above gamma_min",
        ),
        # Trials of different lengths cannot be compared.
        ("train.steps: {kind: choice, values: [5, 6]}", r"space\.train\.steps"),
        ("train.validate_every: {kind: choice, values: [5, 6]}", r"space\.train\.validate_every"),
        ("train: {kind: choice, values: [{steps: 5}, {steps: 6}]}", "differ in train.stream"),
        ("train.stream: {kind: choice, values: [{seed: 5}, {seed: 6}]}", "differ in train.stream"),
        ("workers: {kind: choice, values: [{gpu: true}, {gpu: false}]}", "differ in workers"),
        # A grid has no ranges.
        ("converter.beta: {kind: uniform, low: 1, high: 2}", r"space\.converter\.beta"),
        ("converter.beta: {kind: uniform, low: 2, high: 1}", "below high"),
        ("converter.beta: {kind: choice, values: []}", "at least one"),
        ("", "at least one knob"),
    ],
)
def test_an_impossible_space_is_refused_before_anything_starts(space: str, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        small.load(space=f"{{{space}}}")


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_a_search_cannot_take_is_refused(seed: int) -> None:
    config = small.load(f"seed={2**63 - 1}")
    with pytest.raises(ValueError, match="seed must lie in"):
        replace(config, seed=seed)


KNOBS: dict[str, tuple[object, Callable[..., object]]] = {
    "converter.beta": (0.5, lambda recipe: recipe.converter.beta),
    "support.roar.gamma_max": (30.0, lambda recipe: recipe.support.roar.gamma_max),
    "support.continuous.sigma": (0.5, lambda recipe: recipe.support.continuous.sigma),
    "train.optimizer.lr": (1e-3, lambda recipe: recipe.train.optimizer.lr),
}


@pytest.mark.parametrize("key", KNOBS)
def test_a_knob_of_any_depth_reaches_the_trial(key: str) -> None:
    value, found = KNOBS[key]
    config = small.load()
    trial = config.trial("trial-000", {key: value})
    assert found(trial) == value
    assert found(config.finetune) != value
    assert trial.train.steps == config.finetune.train.steps
    assert (trial.root, trial.name) == ((config.folder / "trials").url, "trial-000")


def test_a_whole_section_replaces_the_other_kind() -> None:
    config = small.load()
    recipe = config.recipe({"support": {"kind": "lognormal", "mu": 1.0}})
    assert recipe.support.kind == "lognormal"
    assert recipe.support.sigma == 1.41


@pytest.mark.parametrize("preset", ["quickstart", "text8", "owt"])
def test_a_preset_is_a_sweep_of_both_levels(preset: str) -> None:
    config = load(SweepConfig, verb="sweep", argv=[preset], presets=tiny.PRESETS)
    assert config.search.count(config.space) >= 6
    assert config.asha is not None
    assert config.asha.grace % config.finetune.train.validate_every == 0
    assert config.asha.rungs(config.finetune.train.steps)
    settings = config.evaluation({"trial-000": "somewhere"})
    assert any(path.splits for path in settings.paths.values())
    assert any(path.nucleus for path in settings.paths.values())
