"""Where the models of an evaluation come from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsl.vocabulary import Vocabulary
from infra.errors import DataError
from infra.registry import ModelVersion
from infra.storage import Folder
from pipelines.evaluation import subjects
from pipelines.models import ConverterConfig
from tests.dsl import hubs


def test_a_version_that_no_run_made_has_no_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least of all that of a run which no server knows either."""
    version = ModelVersion(name="stranger", version=1, run_id=None)
    monkeypatch.setattr(subjects.registry, "describe", lambda address, uri: version)
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline/metrics.jsonl").write_text('{"step": 1, "time": 1.0, "loss": 3.0}\n')
    found = subjects.origin("models.a", "models:/stranger/1", uri="", root=str(tmp_path))
    assert found["version"] == "models:/stranger/1"
    assert "run" not in found


def test_a_network_that_does_not_take_rows_of_the_data_is_refused(tmp_path: Path) -> None:
    hubs.saved(tmp_path / "bert", "bert", special=hubs.SPECIAL)
    vocabulary, length = Vocabulary.load(tmp_path / "bert"), 2000
    held_out: Any = SimpleNamespace(vocabulary=vocabulary, manifest=SimpleNamespace(length=length))
    with pytest.raises(DataError, match=r"models.a: the model does not take rows of 2000 tokens"):
        subjects.freeze(
            "a",
            {"address": str(tmp_path / "bert")},
            held_out,
            Folder.at(str(tmp_path / "models")),
            where="models.a",
            converter=ConverterConfig(embed_dim=4),
            uri="",
            trust_remote_code=False,
        )
    assert not (tmp_path / "models").exists()
