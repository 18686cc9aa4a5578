"""The verb: its plan, what it leaves behind, its last line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from infra import journal
from infra.storage import Folder
from pipelines import benchmark
from pipelines.benchmarks import measure
from tests.pipelines.benchmarks import small


@pytest.fixture
def run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The command line at small sizes: exit code, stdout, stderr."""
    monkeypatch.setattr(measure, "peak_gib", small.in_this_process)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")

    def command(*argv: str) -> tuple[int, str, str]:
        given = ["benchmark.py", *small.SIZES, f"root={tmp_path}", *argv]
        with mock.patch.object(sys, "argv", given):
            code = benchmark.main()
        return code, *capsys.readouterr()

    return command


def last(out: str) -> Any:
    return json.loads(out.splitlines()[-1])


def test_a_dry_run_says_what_would_be_timed(run: Any, tmp_path: Path) -> None:
    code, out, _ = run("only=[sampler,train]", "--dry-run")
    assert code == 0
    assert last(out)["benchmarks"] == ["sampler", "train"]
    assert not list(tmp_path.iterdir())


def test_a_run_leaves_tables_and_metrics(run: Any, tmp_path: Path) -> None:
    code, out, err = run("only=[converter,train]", "threads=2")
    assert code == 0
    result = last(out)
    assert "| forward" in err
    report = json.loads((tmp_path / "benchmark/report/benchmark.json").read_text())
    assert report["machine"]["threads"] == 2
    rows = small.by_key(report["converter"])
    assert result["metrics"]["converter/forward"] == rows["forward"]["ratio"]
    assert result["bars"]["train/dsl"] == "not judged at these sizes"
    assert (tmp_path / "benchmark/report/report.html").exists()
    assert "converter/forward" in journal.read(Folder.at(str(tmp_path / "benchmark")))[-1]

    # A second run shows what the first has measured; other settings are another run.
    assert last(run("only=[converter,train]", "threads=2")[1]) == result
    assert run("only=[converter]")[0] == 2


@pytest.mark.parametrize("preset", ["quickstart", "owt"])
def test_presets(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(sys, "argv", ["benchmark.py", preset, "--print-config"]):
        assert benchmark.main() == 0
    assert f"name: {preset}-benchmark" in capsys.readouterr().out
