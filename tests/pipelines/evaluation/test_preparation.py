"""Whether an evaluation that was begun is of what is meant now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.pipelines.evaluation.conftest import Run


def test_a_finished_evaluation_stands_for_its_weights_and_its_data_alone(
    run: Run, world: Path, tmp_path: Path
) -> None:
    weights, data = tmp_path / "weights", tmp_path / "shards"
    shutil.copytree(world / "dsl", weights)
    shutil.copytree(world / "data/shards", data)
    argv = [f"models={{a: {weights}}}", f"data={data}"]
    code, made, err = run(*argv)
    assert code == 0, err
    assert run(*argv)[1] == made

    shutil.copytree(world / "flat", weights, dirs_exist_ok=True)
    code, _, err = run(*argv)
    assert code == 2
    assert "is an evaluation of other versions of these models" in err
    shutil.copytree(world / "dsl", weights, dirs_exist_ok=True)

    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"]["train"][0]["sha256"] = 64 * "0"
    (data / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = run(*argv)
    assert code == 3
    assert "not the data that this run began with" in err
    assert "existing=restart" in err


def test_the_run_that_made_a_model_may_be_archived(run: Run, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "runs/made", tmp_path / "made")
    argv = ["models={a: 'models:/tiny/1'}"]
    code, made, err = run(*argv)
    assert code == 0, err
    assert made["models"]["a"]["run"] == str(tmp_path / "made")

    (tmp_path / "archive").mkdir()
    shutil.move(tmp_path / "made", tmp_path / "archive/made")
    code, found, err = run(*argv)
    assert (code, found) == (0, made), err
    (tmp_path / "judged/result.json").unlink()  # as if it had been interrupted
    code, found, err = run(*argv)
    assert code == 0, err
    assert "run" not in found["models"]["a"]
