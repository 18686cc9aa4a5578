"""What a sweep says of its trials."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsl.paths import Hybrid, Masked, SentenceSDE
from dsl.truncation import Nucleus
from infra.config import load
from infra.errors import ConfigError, InfraError
from infra.storage import Folder
from infra.tracking import RunHandle
from pipelines import evaluate
from pipelines.evaluation.cells import Cell
from pipelines.evaluation.settings import EvaluateConfig
from pipelines.finetune import FinetuneConfig
from pipelines.generate import GenerateConfig
from pipelines.sweeping import pages, recommendation, second
from pipelines.sweeping.arms import ranked
from pipelines.sweeping.knobs import at, importance
from pipelines.sweeping.second import Walk
from pipelines.sweeping.settings import SecondConfig
from pipelines.sweeping.space import Choice, Knob, LogUniform
from pipelines.sweeping.trials import Trial
from tests.pipelines import tiny
from tests.pipelines.sweeping import small

SPACE: dict[str, Knob] = {
    "converter.beta": LogUniform(low=0.1, high=10.0),
    "converter.skip": Choice(values=(True, False)),
    "support": Choice(values=({"kind": "roar"}, {"kind": "lognormal"})),
}


def trials(count: int = 60) -> list[Trial]:
    """The bound is that of the support, and a little of the skip; beta is nothing."""
    rng = random.Random(0)
    found = []
    for number in range(count):
        settings = {key: knob.probes[rng.random() < 0.5] for key, knob in SPACE.items()}
        settings["converter.beta"] = 10 ** rng.uniform(-1, 1)
        bound = 2 + (settings["support"] == {"kind": "roar"}) + 0.2 * settings["converter.skip"]
        found.append(small.trial(number, settings, "finished", bound + 1, bound))
    return found


def test_importance_finds_what_matters() -> None:
    found = importance(SPACE, at(trials(), 20))
    assert list(found) == list(SPACE)
    assert sum(found.values()) == pytest.approx(1)
    assert found["support"] > 0.8
    assert found["converter.skip"] > 2 * found["converter.beta"]


def test_importance_says_nothing_of_too_few_or_of_equals() -> None:
    assert importance(SPACE, trials(3)) == {}
    same = [small.trial(n, t.settings, "finished", 2.0) for n, t in enumerate(trials(9))]
    assert importance(SPACE, same) == {}


def test_trials_are_compared_at_one_step() -> None:
    """The stopped one as it was, the finished one as it had been, and not who never got there."""
    known = [
        small.trial(0, {}, "finished", 3.0, 2.0),
        small.trial(1, {}, "stopped", 3.5),
        small.trial(2, {}, "failed"),
    ]
    assert [(t.name, t.bound) for t in at(known, 10)] == [("trial-000", 3.0), ("trial-001", 3.5)]
    assert [(t.name, t.bound) for t in at(known, 11)] == [("trial-000", 2.0)]


WALK = Hybrid(SentenceSDE(gamma_max=9.0), Masked(), split=(2, 3))


def walk(model: str, budget: int, **row: float) -> Walk:
    cell = Cell(model=model, path="masked", walk=Masked(), budget=budget)
    return Walk(cell, {"model": model, "path": "masked", "budget": budget, **row})


ARMS = ranked([small.trial(n, {"a": n}, "finished", 2.0 + n) for n in range(2)])
FIRST, OTHER = (arm.trial.name for arm in ARMS)
SECOND = "second={paths: {masked: {path: masked}}, judge: {kind: ngram}, frontier: {}SELECT}"


def second_level(select: str = "") -> SecondConfig:
    found = small.load(SECOND.replace("SELECT", select)).second
    assert found is not None
    return found


def test_the_best_walk_is_by_what_does_not_fall_with_entropy() -> None:
    walks = [
        walk(FIRST, 4, words=0.5, perplexity=3.0),
        walk(FIRST, 8, words=0.6, perplexity=9.0),
        walk(OTHER, 8, words=0.9, perplexity=1.0),
    ]
    assert second.chosen(second_level(), ARMS, walks) == (ARMS[0], walks[1])
    assert second.chosen(second_level(), ARMS, walks[2:]) == (ARMS[0], None)
    assert second.chosen(None, ARMS, []) == (ARMS[0], None)
    wordless = walks[0]._replace(row=walks[0].row | {"words": None})
    assert second.chosen(second_level(), ARMS, [wordless, walks[1]]) == (ARMS[0], walks[1])
    assert second.chosen(second_level(), ARMS, [wordless]) == (ARMS[0], None)


def test_texts_choose_among_trials_where_they_are_to() -> None:
    walks = [
        walk(FIRST, 4, headline_judge=2.5),
        walk(OTHER, 4, headline_judge=2.4),
        walk(FIRST, 8, headline_judge=2.0),
        walk(OTHER, 8),  # does not reach the diversity of real text
    ]
    asked = second_level(", select: {merit: headline_judge}")
    assert second.chosen(asked, ARMS, walks) == (ARMS[0], walks[2])
    few = second_level(", select: {merit: headline_judge, calls: 4}")
    assert second.chosen(few, ARMS, walks) == (ARMS[1], walks[1])
    assert second.chosen(few, ARMS, walks[2:]) == (ARMS[0], None)
    assert second.by(asked, walks[2]) == f"headline_judge 2 along {FIRST}-masked-8"
    why = "the lowest bound, as no walk of at most 4 calls has headline_judge"
    assert second.by(few, None) == why
    assert second.by(second_level(), walks[0]) == second.by(None, None) == "the lowest bound"


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        ("select: {merit: headline_other}", r"select\.merit is one of .*headline_judge"),
        # There is no section `mauve`, so nothing would have it.
        ("select: {merit: mauve}", r"select\.merit is one of"),
        ("select: {merit: words, calls: 0}", "calls must be at least 1"),
        (
            "paths: {masked: {path: masked, budgets: [8]}}, select: {merit: words, calls: 4}",
            "take 8",
        ),
        (
            "paths: {few: {path: masked, budgets: [4]}, many: {path: masked, budgets: [8]}}, "
            "frontier: {paths: [many]}, select: {merit: headline_judge, calls: 4}",
            "take 8",
        ),
        (
            "paths: {masked: {path: masked, budgets: [4, 8]}}, "
            "frontier: {budgets: [8]}, select: {merit: headline_judge, calls: 4}",
            "take 8",
        ),
        ("frontier: {nuclei: [{p: 0.9}]}, select: {merit: headline_judge}", r"frontier\.nuclei"),
    ],
)
def test_what_no_walk_could_have_is_refused_before_any_trial(asked: str, where: str) -> None:
    base = "second={paths: {masked: {path: masked}}, judge: {kind: ngram}, frontier: {}}"
    with pytest.raises(ConfigError, match=where):
        small.load(base, f"second={{{asked}}}")


def test_the_second_level_is_of_the_best_trials_and_takes_headlines_without_a_nucleus_of_their_own(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = "{masked: {path: masked, budgets: [4, 8]}}"
    config = small.load(f"data={data}", f"root={tmp_path}", f"second={{keep: 1, paths: {paths}}}")

    def execute(settings: EvaluateConfig) -> dict[str, str]:
        assert list(settings.models) == [FIRST]
        four, eight = ({"model": FIRST, "path": "masked", "budget": budget} for budget in (4, 8))
        tables = {
            "headline": [four | {"headline_judge": 9.0, "p": 0.9}, four | {"headline_judge": 2.0}],
            "samples": [{"model": "real"}, four | {"words": 0.5}, eight | {"skipped": "because"}],
        }
        report = settings.folder / "report"
        report.write_bytes("evaluation.json", json.dumps(tables).encode())
        return {"report": report.url}

    monkeypatch.setattr(evaluate, "execute", execute)
    monkeypatch.setattr(second, "_show", lambda *_: None)
    handle = RunHandle(folder=config.folder.url, uri="", run_id=None)
    (walked,) = second.run(config, ARMS, handle)
    assert walked.cell.budget == 4
    assert (walked.row["headline_judge"], walked.row["words"]) == (2.0, 0.5)
    assert "p" not in walked.row


def test_only_what_finished_is_ranked_and_nothing_is_an_error_that_says_why() -> None:
    known = [
        small.trial(0, {"a": 0}, "finished", 2.0),
        small.trial(1, {"a": 1}, "stopped", 1.0),
        small.trial(2, {"a": 2}, "finished", 1.5),
    ]
    assert [arm.trial.name for arm in ranked(known)] == ["trial-002", "trial-000"]
    with pytest.raises(ConfigError, match=r"trial-000 failed: because; trial-001 stopped: because"):
        ranked([small.trial(0, {}, "failed"), small.trial(1, {}, "stopped", 1.0)])
    # Not the fault of any setting, and mended by the same command.
    with pytest.raises(InfraError, match=r"trial-000 failed: because; trial-001 lost: because"):
        ranked([small.trial(0, {}, "failed"), small.trial(1, {}, "lost")])


def test_the_report_and_the_preset_of_what_was_found() -> None:
    config = small.load(
        "finetune.train.steps=20",
        "asha={grace: 10}",
        "second={paths: {hybrid: {splits: [[2, 3]], path: "
        "{kind: hybrid, split: [2, 3], first: {kind: sentence_sde, gamma_max: 9}, "
        "second: masked}}}, judge: {kind: ngram}, frontier: {}}",
    )
    settings = [{"converter.beta": beta} for beta in (0.3, 1.0, 3.0)]
    known = [
        small.trial(0, settings[0], "finished", 3.0, 2.0),
        small.trial(1, settings[1], "stopped", 3.5),
        small.trial(2, settings[2], "failed"),
    ]
    row = {"model": "trial-000", "path": "hybrid", "budget": 5, "split": [2, 3], "calls": 5.0}
    cell = Cell(model="trial-000", path="hybrid", walk=WALK, budget=5)
    figures = {"words": 0.5, "entropy": 2.0, "headline_judge": 2.5, "at": 0.7}
    rows = [row | figures]
    made = pages.report(config, known, ranked(known), ranked(known)[0], "the lowest bound", rows)
    table = made.tables["trials"]
    assert [line["trial"] for line in table.rows] == ["trial-000", "trial-001", "trial-002"]
    assert [line["state"] for line in table.rows] == ["finished", "stopped", "failed"]
    assert {plot.name for plot in made.plots} == {
        "bounds",
        "knobs",
        "words_by_calls",
        "words_by_split",
        "headline_judge_by_calls",
        "headline_judge_by_split",
    }
    assert "importance" not in made.tables
    heads, cells = made.tables["walks"].cells()
    assert heads[5].startswith("Bits per byte by judge")
    assert cells == ["trial-000", "hybrid", "[2, 3]", "5", "5", "2.500", "0.500", "0.70", "2.000"]
    assert "because" in made.html()

    preset = yaml.safe_load(
        recommendation.preset(config, ranked(known)[0], Walk(cell, row | {"words": 0.5}))
    )
    assert preset["finetune"]["converter"]["beta"] == 0.3
    assert preset["finetune"]["name"] == "tried-best"
    assert preset["generate"]["path"]["split"] == [2, 3]
    assert preset["generate"]["temperature"] == 1
    cold = Walk(cell, rows[0])
    preset = yaml.safe_load(recommendation.preset(config, ranked(known)[0], cold))
    assert preset["generate"]["temperature"] == 0.7


def test_the_preset_draws_from_the_run_that_it_makes_as_the_second_level_did(
    tmp_path: Path,
) -> None:
    config = small.load(
        "root=memory://bucket/runs/",
        "tracking.uri=http://mlflow:5000",
        "finetune.init=org/model",
        "finetune.trust_remote_code=true",
        "register=tried",
        "second={paths: {masked: {path: masked}}, precision: float32, "
        "samples: {temperature: 0.9, nucleus: {p: 0.8}}}",
    )
    arm = ranked([small.trial(0, {"converter.beta": 3.0}, "finished", 2.0)])[0]
    file = tmp_path / "best.yaml"
    best = walk("trial-000", 4, words=0.5)
    sharp = best._replace(cell=replace(best.cell, nucleus=Nucleus(p=0.7)))
    assert (
        yaml.safe_load(recommendation.preset(config, arm, sharp))["generate"]["nucleus"]["p"] == 0.7
    )
    file.write_text(recommendation.preset(config, arm, best))
    argv: dict[str, Any] = {"argv": [str(file)], "presets": tiny.PRESETS}
    made = load(FinetuneConfig, verb="finetune", **argv)
    drawn = load(GenerateConfig, verb="generate", **argv)
    assert Folder.at(drawn.model).url == made.folder.url
    assert (drawn.path, drawn.budget, drawn.temperature) == (Masked(), 4, 0.9)
    assert (made.register, drawn.nucleus.p) == ("tried", 0.8)
    assert (drawn.precision, drawn.trust_remote_code) == ("float32", True)
