"""`--dry-run` of the verbs that no test of their own has say what they would do, and do nothing."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.pipelines.sweeping import small
from tests.pipelines.test_model import saved

SWEEP = [f"space={small.SPACE}", *small.SETTINGS, "data=DATA", "root=runs", "name=tried"]


@pytest.mark.parametrize(
    ("verb", "argv"),
    [
        ("prepare", ["out=data", "length=32", "vocabulary.size=300"]),
        ("export", ["model=MODEL", "out=exported"]),
        ("sweep", SWEEP),
    ],
)
def test_a_dry_run_touches_nothing(
    verb: str,
    argv: list[str],
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = saved(tmp_path / "model")
    given = [a.replace("DATA", str(tiny_shards)).replace("MODEL", str(model)) for a in argv]
    monkeypatch.setattr(sys, "argv", [verb, *given, "--dry-run"])
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    code = importlib.import_module(f"pipelines.{verb}").main()
    out, err = capsys.readouterr()
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
