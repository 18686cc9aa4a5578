"""What an outage keeps from the first attempt at a sweep comes with a later one: the winner's place
in the registry, and trials that were lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra import tracking
from infra.errors import InfraError
from infra.tracking import connect
from pipelines import finetune, sweep
from pipelines.sweeping import tuning
from pipelines.training import worker
from tests.pipelines.sweeping import small


def away(*_: object) -> Any:
    raise ConnectionError("nothing answers")


@pytest.mark.long
def test_a_server_that_was_away_gets_the_winner_from_the_same_command(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "run", small.one_by_one)
    monkeypatch.setattr(tuning, "_start", lambda workers: worker.train)
    space = "{converter.beta: {kind: choice, values: [3.0]}}"
    config = small.load(f"data={data}", f"root={tmp_path}", "register=tried", space=space)
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_open", away)
        first = sweep.execute(config)
    kept = tmp_path / "tried" / "result.json"
    assert (first["best"], first["model_uri"], kept.exists()) == ("trial-000", None, False)

    second = sweep.execute(config)
    assert second == first | {
        "run_id": second["run_id"],
        "model_uri": "models:/tried/1",
        "alias_uri": "models:/tried@candidate",
    }
    assert json.loads(kept.read_text()) == second == sweep.execute(config)
    renamed = sweep.execute(replace(config, register="other"))
    assert renamed["model_uri"] == "models:/other/1"
    client = connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (version,) = client.search_model_versions("name = 'tried'")
    assert version.tags["sweep_run"] == second["run_id"]
    assert client.get_run(version.run_id).info.run_name == "trial-000"


SECOND = """second={batch: 6, workers: {count: 0}, paths: {masked: {path: masked, budgets: [4]}},
    likelihood: {rows: 4, samples: 2, steps: 2, gamma_max: 9, gamma_star: [9]},
    states: {revealed: [0], gammas: [1]}, samples: {rows: 6, traced: 0}}"""


@pytest.mark.long
def test_a_trial_that_was_lost_is_tried_again_and_its_texts_stand_beside_the_others(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, away = finetune.execute, ["trial-001"]

    def execute(recipe: finetune.FinetuneConfig, **kwargs: Any) -> dict[str, Any]:
        if recipe.name in away:
            raise InfraError("the store", "is away")
        return train(recipe, **kwargs)

    monkeypatch.setattr(finetune, "execute", execute)
    monkeypatch.setattr(tuning, "run", small.one_by_one)
    monkeypatch.setattr(tuning, "_start", lambda workers: worker.train)
    space = "{converter.beta: {kind: choice, values: [0.3, 3.0]}}"
    config = small.load(f"data={data}", f"root={tmp_path}", SECOND, space=space)

    def walked() -> set[str]:
        told = json.loads((tmp_path / "tried/report/sweep.json").read_text())
        return {row["model"] for row in told["walks"]}

    first = sweep.execute(config)
    assert first["failed"] == {"trial-001": "the store: is away"}
    assert walked() == {"trial-000"}
    away.clear()
    second = sweep.execute(config)
    assert (second["failed"], second["metrics"]["trials/finished"]) == ({}, 2)
    assert walked() == {"trial-000", "trial-001"}
    assert sweep.execute(config) == second
