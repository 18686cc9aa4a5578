"""Spaces and searches: what is proposed, that it can be, and that a restart proposes the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError
from pipelines.sweeping.search import Grid, Optuna, Random, study
from pipelines.sweeping.space import Choice, Knob, LogUniform, Uniform, label
from pipelines.sweeping.trials import Trial
from tests.pipelines.sweeping import small

SPACE: dict[str, Knob] = {
    "converter.beta": LogUniform(low=0.1, high=10.0),
    "converter.embed_dim": Uniform(low=4, high=8),
    "support": Choice(values=({"kind": "roar"}, {"kind": "lognormal", "mu": 1.0})),
}
LIST = small.SPACE


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


REFUSED: dict[str, tuple[str, str]] = {
    "a key that is none": (
        "{converter.betta: {kind: uniform, low: 1, high: 2}}",
        r"converter\.betta \(space\): no such key\. Did you mean `beta`",
    ),
    "a value that cannot be": (
        "{support.roar_share: {kind: uniform, low: 0, high: 2}}",
        "roar_share must be",
    ),
    "a value of another type": (
        "{converter.embed_dim: {kind: choice, values: [8, wide]}}",
        "expected int, got 'wide'",
    ),
    "a value of a whole section that cannot be": (
        "{support: {kind: choice, values: [roar, {kind: lognormal, sigma: -1}]}}",
        "sigma must be",
    ),
    "a knob in a knob": (
        "{support: {kind: choice, values: [roar]}, "
        "support.roar_share: {kind: choice, values: [0.5]}}",
        r"space\.support\.roar_share: a knob inside of support",
    ),
    "what trials have in common": (
        "{train.steps: {kind: choice, values: [5, 6]}}",
        "could not be compared",
    ),
    "a range in a grid": (
        "{converter.beta: {kind: uniform, low: 1, high: 2}}",
        r"search grid is of choices, and space\.converter\.beta is uniform",
    ),
    "a range upside down": ("{converter.beta: {kind: uniform, low: 2, high: 1}}", "below high"),
    "no values": ("{converter.beta: {kind: choice, values: []}}", "at least one"),
    "no knob": ("{}", "at least one knob"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_anything_starts(name: str) -> None:
    space, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        small.load(space=space)


def test_combinations_are_refused_too() -> None:
    """Each value is possible by itself, and one pair of them is not."""
    space = (
        "{support.roar.gamma_min: {kind: choice, values: [0, 20]}, "
        "support.roar.gamma_max: {kind: choice, values: [10, 30]}}"
    )
    with pytest.raises(ConfigError, match="gamma_max must be above gamma_min"):
        small.load(space=space)


KNOBS: dict[str, tuple[object, Callable[..., object]]] = {
    "converter.beta": (0.5, lambda recipe: recipe.converter.beta),
    "converter.mask_prior": (0.9, lambda recipe: recipe.converter.mask_prior),
    "converter.embed_dim": (12, lambda recipe: recipe.converter.embed_dim),
    "converter.skip": (False, lambda recipe: recipe.converter.skip),
    "support.roar_share": (0.1, lambda recipe: recipe.support.roar_share),
    "support.roar.gamma_min": (0.2, lambda recipe: recipe.support.roar.gamma_min),
    "support.roar.c": (0.8, lambda recipe: recipe.support.roar.c),
    "support.roar.gamma_max": (30.0, lambda recipe: recipe.support.roar.gamma_max),
    "support.continuous.mu": (1.5, lambda recipe: recipe.support.continuous.mu),
    "support.continuous.sigma": (0.5, lambda recipe: recipe.support.continuous.sigma),
    "train.optimizer.lr": (1e-3, lambda recipe: recipe.train.optimizer.lr),
}


@pytest.mark.parametrize("key", KNOBS)
def test_the_knobs_of_the_papers_reach_the_trial(key: str) -> None:
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
