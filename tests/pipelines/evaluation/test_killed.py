"""An evaluation that is killed goes on where it was: no text is drawn twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from infra.errors import ConfigError, InfraError
from infra.pool import PoolConfig
from infra.storage import Folder
from pipelines.evaluation import engine, preparation
from pipelines.evaluation.cells import REFERENCES
from pipelines.evaluation.parts import Parts, lists
from tests.infra.common import until
from tests.pipelines import tiny
from tests.pipelines.evaluation.conftest import SETTINGS, Run

SCRIPT = tiny.PRESETS.parent / "evaluate.py"
PATHS = """{masked: {path: masked, budgets: [4, 8]}, hybrid: {path: {kind: hybrid,
    first: {kind: sentence_sde, gamma_max: 9}, second: masked, split: [2, 3]}}}"""


def arguments(world: Path, root: Path) -> list[str]:
    """2 models, 4 cells and 2 of another temperature, 20 texts each in parts of 5."""
    models = ", ".join(f"{name}: {world / name}" for name in ("mdlm", "dsl"))
    return [
        *(f"data={world / 'data/shards'}", f"root={root}", f"models={{{models}}}"),
        f"tracking.uri=sqlite:///{world / 'runs/mlflow.db'}",
        *(f"paths={PATHS}", "samples={rows: 20, traced: 2}"),
        *("judge={kind: own, model: " + str(world / "ar") + "}",),
        "frontier={temperatures: [0.5, 1.0], paths: [masked], budgets: [4], resamples: 20}",
    ]


def parts(root: Path) -> dict[str, int]:
    """When each part was written."""
    return {
        str(path.relative_to(root)): path.stat().st_mtime_ns
        for path in root.glob("judged/**/*.parquet")
    }


def finish(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_other_data_are_not_taken_for_those_of_before(tmp_path: Path) -> None:
    kept = Parts(Folder.at(str(tmp_path)))
    kept.write(f"samples/{REFERENCES}", 0, pa.table({"tokens": lists(np.eye(3, dtype=int))}), {})
    survey: Any = SimpleNamespace(
        config=SimpleNamespace(
            data="shards", folder=kept.folder, batch=3, held_out_rows={"likelihood.rows": 3}
        ),
        parts=kept,
        held_out=SimpleNamespace(rows_NL=np.eye(5, 3, dtype=int)),
    )
    preparation.require_same_rows(survey)
    survey.config.held_out_rows["likelihood.rows"] = 2  # of the 3 that are kept
    with pytest.raises(ConfigError, match="shards has changed since"):
        preparation.require_same_rows(survey)
    survey.config.held_out_rows["likelihood.rows"] = 3
    survey.held_out.rows_NL[1] = 7
    with pytest.raises(ConfigError, match="shards has changed since"):
        preparation.require_same_rows(survey)


def test_weights_that_changed_are_not_mixed_with_those_of_before(
    run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "dsl", tmp_path / "weights")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "measure", Mock(side_effect=KeyboardInterrupt))
        assert run(f"models={{a: {tmp_path / 'weights'}}}")[0] > 3
    shutil.copytree(world / "flat", tmp_path / "weights", dirs_exist_ok=True)
    code, _, err = run(f"models={{a: {tmp_path / 'weights'}}}")
    assert code == 2
    assert "is an evaluation of other versions of these models" in err


def prepare(run: Run, monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    """Begin an evaluation that ends before anything is measured."""
    with monkeypatch.context() as patch:
        patch.setattr(engine, "measure", Mock(side_effect=InfraError("pool", "is gone")))
        assert run(*argv)[0] == 4


def test_parts_of_a_cpu_and_of_a_gpu_are_not_mixed(
    run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their noise and, by precision=auto, their dtype are others."""
    argv = [f"models={{a: {world / 'dsl'}}}"]
    prepare(run, monkeypatch, *argv)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        code, _, err = run(*argv, "workers.gpu=true")
    assert code == 2
    assert "workers.gpu: cuda, bfloat16 here, but cpu, float32 in the parts" in err
    assert run(*argv, "workers.gpu=true")[0] == 0  # of a machine without one, which changes nothing


@pytest.mark.parametrize("name", ["subjects.json", "readers.json", "device.json"])
def test_what_parts_were_made_with_is_not_made_up_where_it_is_damaged(
    run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    argv = [f"models={{a: {world / 'dsl'}}}"]
    prepare(run, monkeypatch, *argv)
    (tmp_path / "judged" / name).write_text("[")
    code, _, err = run(*argv)
    assert code == 3
    assert f"judged/{name}: not JSON" in err
    assert err.strip().endswith("existing=restart makes the evaluation anew")
    assert run(*argv, "existing=restart")[0] == 0


def test_parts_of_models_that_are_no_longer_known_are_not_taken_for_those_of_others(
    run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, folder = tmp_path / "weights", tmp_path / "judged"
    shutil.copytree(world / "dsl", weights)
    paths = "paths={masked: {path: masked, budgets: [2]}}"
    argv = [f"models={{a: {weights}}}", "adversaries=true", paths]
    prepare(run, monkeypatch, *argv)
    (folder / "subjects.json").unlink()  # as after a kill before the first part of a model
    code, _, err = run(*argv)
    assert code == 0, err
    for lost in ("subjects.json", "result.json"):
        (folder / lost).unlink()
    shutil.copytree(world / "flat", weights, dirs_exist_ok=True)
    for place in ("samples", "parts"):
        kept = sorted(folder.rglob("*"))
        code, _, err = run(*argv)
        assert code == 3
        assert f"subjects.json: not there, though {folder / place}" in err
        assert err.strip().endswith("existing=restart makes the evaluation anew")
        assert sorted(folder.rglob("*")) == kept
        shutil.rmtree(folder / "samples/a-masked-2", ignore_errors=True)


def test_parts_that_follow_from_the_data_are_written_again_where_they_are_missing(
    run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [f"models={{a: {world / 'dsl'}}}", "adversaries=true", "judge={kind: ngram}"]
    prepare(run, monkeypatch, *argv)
    before = {path: pq.read_table(path) for path in tmp_path.glob("judged/*/**/*.parquet")}
    assert len(before) > 20
    folder = tmp_path / "judged"
    for torn in ("samples/references/00000005", "samples/real/00000000", "samples/copier/00000005"):
        (folder / f"{torn}.parquet").unlink()
    for group in ("parts/words", "parts/training", "samples/unigram", "parts/likelihood/unigram"):
        shutil.rmtree(folder / group)
    kept = parts(tmp_path)
    code, _, err = run(*argv)
    assert code == 0, err
    assert all(pq.read_table(path).equals(table) for path, table in before.items())
    assert kept.items() <= parts(tmp_path).items()  # none of the others was written again


def test_without_any_reference_the_rows_are_those_of_the_data(
    run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [f"models={{a: {world / 'dsl'}}}"]
    prepare(run, monkeypatch, *argv)
    shutil.rmtree(tmp_path / "judged/samples/references")
    code, _, err = run(*argv)
    assert code == 0, err
    kept = pq.read_table(tmp_path / "judged/samples/references")
    assert kept["row"].to_pylist() == list(range(8))


def test_few_texts_are_read_where_all_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a pool may have GPUs that this one lacks."""
    used: list[int] = []
    monkeypatch.setattr(engine.pool, "connected", lambda workers: nullcontext())
    monkeypatch.setattr(
        engine, "_run", lambda stage, parts, survey, workers: used.append(workers.count)
    )
    survey: Any = SimpleNamespace(subjects=(), sources=("real",), further=(), count=lambda _: 1)
    for gpu in (True, False):
        workers = PoolConfig(count=2, gpu=gpu)
        survey.config = SimpleNamespace(workers=workers, questions=())
        engine.measure(survey)
    assert used == [2, 2, 2, 2, 0, 0]


def test_kill_and_go_on(run: Run, world: Path, tmp_path: Path) -> None:
    code, whole, err = run(*arguments(world, tmp_path / "whole"))
    assert code == 0, err

    line = [sys.executable, str(SCRIPT), *SETTINGS, *arguments(world, tmp_path / "killed")]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    drawn = tmp_path / "killed/judged/samples/dsl-masked-4"
    until(lambda: process.poll() is not None or drawn.exists(), 900, every_s=0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it had not ended by itself
    before = parts(tmp_path / "killed")
    assert not (tmp_path / "killed/judged/result.json").exists()
    assert not (tmp_path / "killed/judged/report").exists()

    made = finish(line)
    after = parts(tmp_path / "killed")
    assert after.keys() == parts(tmp_path / "whole").keys()
    assert 20 < len(before) < len(after)
    assert {name: after[name] for name in before} == before  # none was made again

    def measured(metrics: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if not name.endswith("/seconds")}

    assert measured(made["metrics"]) == measured(whole["metrics"])
    for name in after:
        if "/samples/" in name:
            texts = [pq.read_table(tmp_path / run / name) for run in ("whole", "killed")]
            kept = [column for column in texts[0].column_names if column != "seconds"]
            assert texts[0].column_names == texts[1].column_names
            assert texts[0].select(kept).equals(texts[1].select(kept))
