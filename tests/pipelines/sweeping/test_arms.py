"""One knob at a time: which trials there are, and what is said of their differences."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.config import load
from infra.errors import ConfigError
from infra.tracking import connect
from pipelines import sweep
from pipelines.finetune import FinetuneConfig
from pipelines.sweep import plan
from pipelines.sweeping import knobs, pages, recommendation, tuning
from pipelines.sweeping.arms import NONE_SEEN, difference, paired, ranked
from pipelines.sweeping.search import OneAtATime
from pipelines.sweeping.settings import SweepConfig
from pipelines.sweeping.trials import SEED, Trial
from pipelines.training import worker
from tests.pipelines import tiny
from tests.pipelines.sweeping import small

SPACE = (
    "{converter.beta: {kind: choice, values: [0.3, 3.0]}, "
    "converter.skip: {kind: choice, values: [false]}}"
)
SEARCH = (
    "search={kind: one_at_a_time, repeats: 4, "
    "arms: {all: {converter.beta: 3, converter.skip: false}}}"
)
NAMES = ["base", "converter.beta=0.3", "converter.beta=3.0", "converter.skip=false", "all"]


def config(*argv: str, space: str = SPACE) -> SweepConfig:
    return small.load(SEARCH, *argv, space=space)


def search(config: SweepConfig) -> OneAtATime:
    assert isinstance(config.search, OneAtATime)
    return config.search


def swept(config: SweepConfig, effect: dict[str, float], noise: float = 0.01) -> list[Trial]:
    """Every trial, whose bound is its seed's, far from the others', and its arm's effect."""
    rng = random.Random(0)
    names = list(search(config).named(config.space))
    trials: list[Trial] = []
    while (chosen := config.search.propose(config.space, config.seed, trials)) is not None:
        bound = 2 + chosen[SEED] + effect.get(names[len(trials) % len(names)], 0.0)
        bound += rng.gauss(0, noise)
        trials.append(small.trial(len(trials), dict(chosen), "finished", bound))
    return trials


def test_the_base_and_one_change_at_a_time_with_the_same_seeds() -> None:
    made = config("seed=7")
    assert list(search(made).named(made.space)) == NAMES
    planned = made.search.planned(made.space, made.seed)
    assert len(planned) == made.search.count(made.space) == 20
    assert [settings[SEED] for settings in planned] == [n for n in (7, 8, 9, 10) for _ in NAMES]
    assert planned[:3] == [
        {SEED: 7},
        {"converter.beta": 0.3, SEED: 7},
        {"converter.beta": 3.0, SEED: 7},
    ]
    trial = made.trial("trial-001", planned[6])
    assert (trial.converter.beta, trial.train.stream.seed) == (0.3, 8)
    assert trial.converter.skip is made.finetune.converter.skip


@pytest.mark.parametrize(
    ("argv", "space", "where"),
    [
        # Two arms of one recipe: a value that finetune has already, and two sections.
        ([], "{converter.mask_prior: {kind: choice, values: [0.5]}}", "makes the same recipe as"),
        (
            ["search.kind=grid", "finetune.support={kind: mixed, roar: {gamma_max: 30}}"],
            "{support.roar: {kind: choice, values: [{}, {gamma_max: 30}]}}",
            "makes the same recipe",
        ),
        (["asha={grace: 4}"], SPACE, "^asha: "),
        # It would have no effect.
        (["finetune.train.stream.seed=7"], SPACE, r"^finetune\.train\.stream\.seed: "),
        (["search.repeats=1"], SPACE, r"search\.repeats"),
        ([], "{converter.beta: {kind: uniform, low: 1, high: 2}}", r"space\.converter\.beta"),
        (["search.arms={odd: {support.c: 1}}"], SPACE, r"search\.arms\.odd\.support\.c"),
        (["search.arms={base: {converter.beta: 9}}"], SPACE, r"search\.arms\.base"),
        (["search.arms={converter.beta: {converter.beta: 9}}"], SPACE, r"arms\.converter\.beta: "),
        (
            ["search.arms={converter.beta=3.0: {converter.beta: 9}}"],
            SPACE,
            r"arms\.converter\.beta=",
        ),
    ],
)
def test_what_could_not_be_compared_is_refused(argv: list[str], space: str, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        small.load("search={kind: one_at_a_time, repeats: 3}", *argv, space=space)


def test_the_interval_is_students() -> None:
    """By hand: of .1, .2, .3 the standard error is .1/sqrt(3), and t(.975, 2) = 4.3027."""
    found = paired([0.1, 0.2, 0.3])
    assert found.mean == pytest.approx(0.2)
    assert found.stderr == pytest.approx(0.1 / math.sqrt(3))
    assert found.high - found.mean == pytest.approx(4.302653 * found.stderr)
    assert found.verdict == NONE_SEEN
    assert paired([0.19, 0.2, 0.21]).verdict == "worse"
    assert paired([-0.19, -0.2, -0.21]).verdict == "better"
    assert paired([0.2]).verdict == "too few repeats"


def test_the_interval_covers_what_it_says() -> None:
    rng = random.Random(0)
    covered = []
    for _ in range(2000):
        found = paired([rng.gauss(0.5, 1) for _ in range(4)])
        covered.append(found.low <= 0.5 <= found.high)
    assert statistics.fmean(covered) == pytest.approx(0.95, abs=0.015)


def test_differences_are_paired_by_seed() -> None:
    """Seeds differ a hundred times as much as arms, and in another order."""
    one = ranked([small.trial(n, {SEED: n, "a": 1}, "finished", n + 0.1) for n in range(3)])[0]
    other = ranked([small.trial(n, {SEED: n}, "finished", float(n)) for n in (2, 0, 1, 5)])[0]
    found = difference(one, other)
    assert found.pairs == 3
    assert found.mean == pytest.approx(0.1)
    assert found.stderr == pytest.approx(0, abs=1e-9)


def test_arms_rank_by_their_mean_and_after_those_that_lack_no_repeat() -> None:
    bounds = {"a": (2.0, 2.2), "b": (1.9, 2.4), "c": (1.0,)}
    trials = [
        small.trial(n, {"arm": name, SEED: n}, "finished", bound)
        for name, of_arm in bounds.items()
        for n, bound in enumerate(of_arm)
    ]
    arms = ranked([*trials, small.trial(9, {"arm": "c", SEED: 1}, "failed")])
    assert [arm.settings["arm"] for arm in arms] == ["a", "b", "c"]
    assert arms[0].bound == pytest.approx(2.1)
    assert arms[1].trial.bound == 1.9  # the first, not the best of them by choice


def test_a_value_without_a_difference_hides_no_better_one() -> None:
    """It has no seed in common with the base, and stands between two values that have."""
    made = small.load("search={kind: one_at_a_time, repeats: 3}")
    bounds = {
        None: {0: 2.0, 1: 2.01},
        0.3: {0: 1.9, 1: 1.912},
        1.0: {2: 1.7},
        3.0: {0: 1.5, 1: 1.511},
    }
    trials = [
        small.trial(
            0, {**({"converter.beta": beta} if beta else {}), SEED: seed}, "finished", bound
        )
        for beta, of_arm in bounds.items()
        for seed, bound in of_arm.items()
    ]
    rows = compared(made, trials)
    assert [row["value"] for row in rows] == [3.0, 0.3, 1.0]
    (beta,) = knobs.recommend(made, rows)
    assert (beta["recommended"], beta["says"]) == (3.0, knobs.DIFFERS)


@pytest.fixture
def told() -> tuple[SweepConfig, list[Trial]]:
    made = config()
    effect = {"converter.beta=3.0": -0.2, "converter.beta=0.3": 0.3, "converter.skip=false": 0.4}
    return made, swept(made, effect | {"all": -0.1})


def compared(made: SweepConfig, trials: list[Trial]) -> list[Any]:
    return knobs.compare(made, search(made), ranked(trials))


def test_every_arm_stands_against_the_base(told: tuple[SweepConfig, list[Trial]]) -> None:
    rows = compared(*told)
    assert [(row["knob"], row["value"], row["verdict"]) for row in rows] == [
        ("converter.beta", 3.0, "better"),
        ("all", "several at once", "better"),
        ("converter.beta", 0.3, "worse"),
        ("converter.skip", "false", "worse"),
    ]
    assert rows[0]["difference"] == pytest.approx(-0.2, abs=0.03)
    assert rows[0]["low"] < rows[0]["difference"] < rows[0]["high"] < 0


def test_each_knob_is_confirmed_or_not(told: tuple[SweepConfig, list[Trial]]) -> None:
    made, trials = told
    beta, skip = knobs.recommend(made, compared(made, trials))
    assert (beta["base"], beta["recommended"], beta["says"]) == ("null", 3.0, knobs.DIFFERS)
    assert (skip["recommended"], skip["says"]) == ("true", knobs.CONFIRMS)
    (_, skip) = knobs.recommend(made, compared(made, swept(made, {}, noise=0.5)))
    assert (skip["recommended"], skip["says"]) == ("true", knobs.OPEN)


def test_a_knob_of_a_section_that_the_base_leaves_out() -> None:
    space = "{lora.rank: {kind: choice, values: [2, 4]}}"
    made = small.load("search.kind=one_at_a_time", "finetune.init=runs/base", space=space)
    trials = swept(made, {"lora.rank=4": -0.2})
    (rank,) = knobs.recommend(made, compared(made, trials))
    assert (rank["base"], rank["recommended"]) == ("null", 4)


def test_a_knob_with_one_repeat_is_not_known_to_make_no_difference() -> None:
    made = config()
    once = [t for t in swept(made, {}) if not t.arm or t.settings[SEED] == 0]
    assert {row["says"] for row in knobs.recommend(made, compared(made, once))} == {knobs.UNKNOWN}


def test_a_base_is_not_confirmed_against_a_value_that_was_never_measured() -> None:
    made = config()
    worse = {"converter.beta=3.0": 0.3, "converter.beta=0.3": 0.3, "converter.skip=false": 0.4}
    trials = [t for t in swept(made, worse) if t.arm != {"converter.beta": 3.0}]
    beta, skip = knobs.recommend(made, compared(made, trials))
    assert (beta["value"], beta["says"]) == (0.3, knobs.UNKNOWN)
    assert skip["says"] == knobs.CONFIRMS


def test_a_sure_gain_is_recommended_before_a_larger_one_that_may_be_chance() -> None:
    made = config()
    known = {"knob": "converter.beta", "value": 0.3, "verdict": NONE_SEEN, "difference": -0.9}
    sure = {"knob": "converter.beta", "value": 3.0, "verdict": "better", "difference": -0.2}
    (beta,) = knobs.recommend(made, [known, sure])
    assert (beta["recommended"], beta["difference"]) == (3.0, -0.2)


def test_what_did_not_finish_is_said_and_not_compared(
    told: tuple[SweepConfig, list[Trial]],
) -> None:
    made, trials = told
    lost = [replace(t, state="failed") if t.arm == {"converter.skip": False} else t for t in trials]
    rows = compared(made, lost)
    assert rows[-1] == {
        "knob": "converter.skip", "value": "false", "skipped": "no repeat finished"
    }  # fmt: skip
    no_base = [replace(t, state="failed") if not t.arm else t for t in trials]
    assert {row["skipped"] for row in compared(made, no_base)} == {"the base did not finish"}
    assert knobs.plot_arms(compared(made, no_base)) is None


def test_the_report_and_the_preset(told: tuple[SweepConfig, list[Trial]]) -> None:
    made, trials = told
    arms = ranked(trials)
    report = pages.report(made, trials, arms, arms[0], "the lowest bound", [])
    assert list(report.tables) == ["against", "recommendation", "trials"]
    assert [plot.name for plot in report.plots] == ["against", "bounds"]
    assert arms[0].trial.name == "trial-002"
    assert "best: trial-002" in report.subtitle
    assert "next: trial-004, +0." in report.subtitle
    assert report.subtitle.endswith("recommended: trial-002, by the lowest bound")
    assert report.tables["trials"].cells()[0][1:4] == ["beta", "skip", "seed"]
    text = recommendation.preset(made, arms[0], None)
    assert "mean of 4 repeats" in text
    finetune = yaml.safe_load(text)["finetune"]
    assert finetune["converter"]["beta"] == 3.0
    assert finetune["train"]["stream"]["seed"] == made.seed


SECOND = """second={keep: 2, batch: 6, workers: {count: 0},
    paths: {masked: {path: masked, budgets: [4]}},
    likelihood: {rows: 4, samples: 2, steps: 2, gamma_max: 9, gamma_star: [9]},
    states: {revealed: [0], gammas: [1]}, samples: {rows: 6, traced: 0}}"""


def test_a_sweep_of_arms_from_its_beginning_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Ray, and interrupted after two trials."""
    monkeypatch.setattr(tuning, "_start", lambda workers: worker.train)
    argv = [f"data={tiny.shards(tmp_path / 'data')}", f"root={tmp_path}", SECOND, "register=tried"]
    space = "{converter.beta: {kind: choice, values: [3.0]}}"
    made = small.load("search={kind: one_at_a_time, repeats: 2}", *argv, space=space)

    monkeypatch.setattr(tuning, "run", partial(small.one_by_one, most=2))
    with pytest.raises(KeyboardInterrupt):
        sweep.execute(made)
    # The third has been proposed, and is not trained yet; it is the first of the last two.
    monkeypatch.setattr(tuning, "run", partial(small.one_by_one, most=2))
    result = sweep.execute(made)

    told = json.loads((tmp_path / "tried/report/sweep.json").read_text())
    (row,) = told["against"]
    bounds = {trial["trial"]: trial["bound"] for trial in told["trials"]}
    pairs = [bounds[f"trial-{b:03d}"] - bounds[f"trial-{a:03d}"] for a, b in ((0, 1), (2, 3))]
    assert row["difference"] == pytest.approx(statistics.fmean(pairs))
    assert pairs[0] != pairs[1]
    # Each arm's first repeat stands for it: it is evaluated, registered, and in the preset.
    assert {row["model"] for row in told["walks"]} == {"trial-000", "trial-001"}
    best = ["trial-000", "trial-001"][row["difference"] < 0]
    assert result["best"] == told["ranking"][0]["trials"][0] == best
    assert result["model"] == str(tmp_path / "tried/trials" / best / "model")
    client = connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (version,) = client.search_model_versions("name = 'tried'")
    assert version.tags["trial"] == best
    argv = [str(tmp_path / "tried/best.yaml")]
    again = load(FinetuneConfig, verb="finetune", argv=argv, presets=tiny.PRESETS)
    assert again.train == made.trial(best, {SEED: made.seed}).train


def test_the_shipped_one_and_what_it_would_take(tiny_shards: Any) -> None:
    argv = ["small_ablation", "finetune.init=scratch", f"data={tiny_shards}"]
    made = load(SweepConfig, verb="sweep", argv=argv, presets=tiny.PRESETS)
    planned = plan(made)
    assert (planned["arms"], planned["repeats"], planned["trials"]) == (10, 3, 30)
    assert made.own("converter.embed_dim") == 16
