"""The winner of a sweep is registered, if not by the first attempt then by a later one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra import tracking
from infra.tracking import connect
from pipelines import sweep
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
