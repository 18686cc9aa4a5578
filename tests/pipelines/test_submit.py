"""The cluster way: `ray job submit … -- python pipelines/finetune.py`, behind a token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import cluster, head
from infra.tracking import connect
from tests.infra.common import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def running_head(tmp_path: Path) -> Iterator[Path]:
    state = tmp_path / "cluster"
    head.up(state, dashboard_port=free_port(), num_cpus=4)
    yield state
    head.down(state)


@pytest.mark.long  # that a job is submitted and ends with its own exit code is in test_cluster.py
def test_a_submitted_job_trains_and_its_run_knows_the_commit(
    running_head: Path, tmp_path: Path, tiny_shards: Path
) -> None:
    runs = tmp_path / "runs"
    settings = [
        "name=job", f"root={runs}", f"data={tiny_shards}", "init=scratch", "register=dsl-job",
        "backbone.width=32", "backbone.blocks=1", "backbone.heads=2", "converter.embed_dim=8",
        "train.steps=3", "train.stream.rows_per_microbatch=4", "workers.parallel.threads=1",
    ]  # fmt: skip
    code = head.submit(running_head, ["python", "pipelines/finetune.py", *settings], ROOT)
    assert code == 0
    result = json.loads((runs / "job" / "result.json").read_text())
    assert result["model_uri"] == "models:/dsl-job/1"
    tags = connect(f"sqlite:///{runs / 'mlflow.db'}").get_run(result["run_id"]).data.tags
    commit = cluster.commit(ROOT)
    assert commit is not None
    assert tags["commit"] == commit.sha
    assert tags["ray_job_id"].startswith("job-")
