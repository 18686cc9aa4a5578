"""Where the models of an evaluation come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.registry import ModelVersion
from pipelines.evaluation import subjects


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
