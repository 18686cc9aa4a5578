"""The quickstart's summary, from a made-up result, and that Ray is started once for all verbs."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from infra import cluster, local
from infra.cluster import ClusterConfig
from pipelines.examples import quickstart
from pipelines.examples.quickstart import QuickstartConfig, summary

MADE: dict[str, dict[str, Any]] = {
    "prepare": {"rows": {"train": 1450, "test": 70}, "length": 64, "vocabulary": 2048},
    "pretrain": {},
    "finetune": {"alias_uri": "models:/dsl-quickstart@candidate"},
    "evaluate": {"report": "/runs/report/report.html", "tables": "", "champion": {"moved": True}},
}
TABLES: dict[str, list[dict[str, Any]]] = {
    "likelihood": [
        {"model": "unigram", "view": "exact", "bits_per_byte": 3.2, "bits_per_byte_stderr": 0.07},
        {"model": "mdlm", "view": "endpoint_bound", "bits_per_byte": 3.1},
        {"model": "dsl", "view": "endpoint_bound", "bits_per_byte": 3.0},
    ],
    "gate": [{"verdict": "better", "difference": 0.2, "low": 0.15, "high": 0.25}],
    "samples": [
        {"model": "unigram", "words": 0.6, "words_stderr": 0.01},
        {"model": "real", "words": 0.95, "words_stderr": 0.01},
        {"model": "mdlm", "path": "masked", "budget": 32, "words": 0.99},
        {"model": "dsl", "path": "masked", "budget": 8, "words": 0.7, "words_stderr": 0.02},
        {"model": "dsl", "path": "masked", "budget": 32, "words": 0.75, "words_stderr": 0.02},
        {"model": "dsl", "path": "hybrid", "budget": 32, "words": 0.8, "words_stderr": 0.02},
        {"model": "dsl", "path": "refused", "reason": "it cannot be walked"},
    ],
}
TEXTS = {"masked, 32 calls": "one\n\ntwo  " * 40, "hybrid, 32 calls": "a dictionary"}


def shown(**given: Any) -> str:
    settings = {"made": MADE, "tables": TABLES, "texts": TEXTS, "seconds": 190.0, **given}
    return "\n".join(summary(**settings))


def test_the_summary_fits_the_terminal() -> None:
    text = shown()
    assert len(text.splitlines()) <= quickstart.MOST - 1  # the last line is the result
    assert max(map(len, text.splitlines())) <= quickstart.WIDTH
    many = shown(texts={f"path {number}": "text" for number in range(40)})
    assert len(many.splitlines()) <= quickstart.MOST - 1


def test_the_summary_says_what_was_measured() -> None:
    text = shown()
    for part in (
        "3:10 min",
        "models:/dsl-quickstart@candidate",
        "3.200 ± 0.070",  # the unigram
        "0.150 to 0.250",  # the gate's interval
        "0.800 ± 0.020",  # DSL's best path, not the other model's
        "masked with 8 calls",
        "masked, 32 calls: one two one two",
        "/runs/report/report.html",
    ):
        assert part in text, part


def test_a_summary_without_a_gate_or_a_registered_model() -> None:
    text = shown(
        made={**MADE, "finetune": {"model_uri": None}},
        tables={key: rows for key, rows in TABLES.items() if key != "gate"},
    )
    assert "not registered" in text
    assert "interval" not in text


@pytest.mark.parametrize(
    ("finished", "existing"), [(False, "resume"), (True, "resume"), (True, "restart")]
)
def test_ray_is_started_once_for_all_verbs_and_for_none_that_are_finished(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    finished: bool,
    existing: Any,
) -> None:
    idle = finished and existing == "resume"
    monkeypatch.chdir(tmp_path)
    for name in ("mdlm", "dsl", "evaluation") if finished else ():
        (tmp_path / f"runs/quickstart-{name}").mkdir(parents=True)
        (tmp_path / f"runs/quickstart-{name}/result.json").write_text("{}")
    starts: list[str] = []
    connected = [False]

    def init(**settings: Any) -> None:
        starts.append("ray")
        connected[0] = True

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: connected[0])
    monkeypatch.setattr(ray, "shutdown", lambda: connected.__setitem__(0, False))
    monkeypatch.setattr(cluster, "_relayed", lambda: None)
    monkeypatch.setattr(local, "_raylet_watched", nullcontext)
    (tmp_path / "evaluation.json").write_text(json.dumps(TABLES))
    made = {**MADE, "evaluate": {**MADE["evaluate"], "tables": f"{tmp_path}/evaluation.json"}}
    ran: list[str] = []
    told: list[str] = []
    configured = quickstart._module

    def module(name: str) -> Any:
        def execute(config: Any, show: Any = None) -> Any:
            with nullcontext() if idle else cluster.connected(ClusterConfig()):
                ran.append(name)
            if name != "generate":
                told.append(config.existing)
            if show:
                show({"text": "a text", "calls": config.budget})
            return made.get(name)

        return SimpleNamespace(**{**vars(configured(name)), "execute": execute})

    monkeypatch.setattr(quickstart, "_module", module)
    result = quickstart.execute(QuickstartConfig(existing=existing))
    assert starts == ([] if idle else ["ray"])
    assert not connected[0]
    assert ran[:4] == ["prepare", "pretrain", "finetune", "evaluate"]
    assert told == [existing] * 4
    assert set(ran[4:]) == {"generate"}
    assert result["texts"] == len(ran[4:])
    assert "a text" in capsys.readouterr().err
