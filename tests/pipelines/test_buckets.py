"""Every path of every verb in a bucket; nothing but MLflow's database is on a disk.

The sweep, which needs a cluster: tests/faults/test_store.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from infra import config
from infra.shards import read_manifest
from infra.storage import Folder
from pipelines import benchmark, evaluate, generate
from tests.infra.faulty import BUCKET, FaultyStore
from tests.pipelines import tiny
from tests.pipelines.benchmarks.small import SIZES
from tests.pipelines.evaluation.conftest import SETTINGS as EVALUATED

S3 = f"s3://{BUCKET}"


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"tracking.uri=sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def store() -> Iterator[FaultyStore]:
    with FaultyStore() as store:
        yield store


@pytest.fixture(scope="module")
def data(store: FaultyStore) -> str:
    source, out = f"{S3}/text/counting.jsonl", f"{S3}/shards"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in tiny.documents())
    Folder.at(f"{S3}/text").write_bytes("counting.jsonl", lines.encode())
    tiny.execute("prepare", f"source={source}", f"out={out}")
    return out


@pytest.fixture(scope="module")
def mdlm(data: str, tracking: str) -> str:
    made = tiny.execute("pretrain", f"data={data}", f"root={S3}/runs", "name=mdlm", tracking)
    assert made["run_id"]
    return f"{S3}/runs/mdlm"


def run(verb: Any, settings: Any, *argv: str) -> dict[str, Any]:
    name = verb.__name__.rpartition(".")[2]
    return verb.execute(config.load(settings, verb=name, argv=argv, presets=tiny.PRESETS))


def test_the_tokenizer_of_other_shards(data: str) -> None:
    tiny.execute(
        "prepare", f"source={S3}/text/*.jsonl", f"out={S3}/again",
        f"vocabulary={{kind: file, path: {data}/tokenizer.json}}",
    )  # fmt: skip
    assert read_manifest(f"{S3}/again").vocabulary.sha256 == read_manifest(data).vocabulary.sha256


def test_pretrain(mdlm: str) -> None:
    assert set(Folder.at(mdlm).names()) > {
        "checkpoints", "config.yaml", "init", "metrics.jsonl", "model", "result.json", "run.json",
    }  # fmt: skip
    assert (Folder.at(mdlm) / "checkpoints").names() == ["step_000009", "step_000012"]


def test_finetune_from_a_bucket_and_resume(data: str, mdlm: str, tracking: str) -> None:
    given = [f"data={data}", f"root={S3}/runs", "name=dsl", f"init={mdlm}", tracking]
    made = tiny.execute("finetune", *given)
    assert made["model"] == f"{S3}/runs/dsl/model"
    Folder.at(f"{S3}/runs/dsl").remove("result.json")
    (Folder.at(f"{S3}/runs/dsl") / "model").remove()
    again = tiny.execute("finetune", *given)
    assert again["metrics"] == made["metrics"]


def test_generate(mdlm: str, tracking: str) -> None:
    Folder.at(S3).write_bytes("asked.txt", b"one two _\n")
    out = f"{S3}/samples"
    made = run(
        generate, generate.GenerateConfig, f"model={mdlm}", f"input={S3}/asked.txt", "rows=1",
        "budget=2", f"out={out}", f"film={out}/film.html", f"root={S3}/runs", tracking,
    )  # fmt: skip
    assert Folder.at(out).names() == ["film.html", "samples.jsonl", "samples.txt"]
    assert made["txt"] == f"{out}/samples.txt"


def test_evaluate(data: str, mdlm: str, tracking: str) -> None:
    made = run(
        evaluate, evaluate.EvaluateConfig, *EVALUATED, f"data={data}", f"models={{mdlm: {mdlm}}}",
        "paths={masked: {path: masked, budgets: [2]}}", f"root={S3}/runs", tracking,
    )  # fmt: skip
    assert made["report"] == f"{S3}/runs/judged/report/report.html"
    assert Folder.at(f"{S3}/runs/judged/report").exists("report.html")


def test_benchmark(tracking: str) -> None:
    made = run(
        benchmark, benchmark.BenchmarkConfig, "name=timed", "only=[converter]", *SIZES,
        f"root={S3}/runs", tracking,
    )  # fmt: skip
    assert made["report"] == f"{S3}/runs/timed/report/report.html"


def test_a_preset_in_a_bucket(data: str) -> None:
    preset = f"pretrain: {{name: preset, data: {data}, root: {S3}/runs}}"
    Folder.at(S3).write_bytes("preset.yaml", preset.encode())
    assert tiny.load("pretrain", f"{S3}/preset.yaml").data == data
