"""An object store that fails, under every operation and under a whole run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import fsspec
import pytest

from infra import checkpoints, storage
from infra.checkpoints import committed
from infra.storage import Folder
from tests.faults.conftest import Cost
from tests.faults.processes import PATIENCE_S
from tests.infra import operations
from tests.infra.faulty import BUCKET, FAULTS, FaultyStore, answer
from tests.infra.operations import OPERATIONS, folder, store
from tests.pipelines import tiny

__all__ = ["folder", "store"]

RUNS = f"s3://{BUCKET}/runs"
EVERY = 3  # steps from one checkpoint to the next


@pytest.fixture(scope="module")
def _server(data: Path) -> Iterator[FaultyStore]:
    with FaultyStore() as store:
        store.filesystem.put(f"{data}/", f"{BUCKET}/data/", recursive=True)
        yield store


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_moment_of_it(fault: str, name: str, store: FaultyStore, folder: Folder) -> None:
    operation = OPERATIONS[name]
    store.fail(FAULTS[fault], method=operation.method, key=operation.key, times=2)
    operation.act(folder)
    assert operations.readable(folder)[0] == 1


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "slow"])
def test_no_end_of_it(
    fault: str, name: str, store: FaultyStore, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    retries = fsspec.config.conf["s3"]["config_kwargs"]["retries"]
    monkeypatch.setitem(retries, "total_max_attempts", 2)
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    monkeypatch.setattr(checkpoints, "PAUSES_S", ())
    store.forget_clients()
    operation, folder = OPERATIONS[name], Folder.at(folder.url)
    store.fail(FAULTS[fault], method=operation.method, key=operation.key)
    message = operations.failure(operation, folder)
    assert message.count("the store does not answer") == 1
    assert ("last good one: step 1" in message) == (operation.act is operations.write_checkpoint)
    store.heal()
    # An answer that is lost may be that to a request which was done.
    assert operations.readable(folder) in ([1], [1, 2] if fault == "cut answer" else [1])


class Ended(NamedTuple):
    code: int
    message: str
    seconds: float


def begin(name: str, *argv: str) -> subprocess.Popen[str]:
    """`pretrain` on the bucket, in a process of its own."""
    given = [f"data=s3://{BUCKET}/data", f"root={RUNS}", f"name={name}", *argv]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipelines.tiny", "pretrain", *given],
        env=os.environ | {"PYTHONPATH": os.getcwd()}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def end(process: subprocess.Popen[str], began: float) -> Ended:
    _, said = process.communicate(timeout=2 * PATIENCE_S)
    return Ended(process.returncode, (said.splitlines() or [""])[-1], time.monotonic() - began)


def pretrain(name: str, *argv: str) -> Ended:
    return end(begin(name, *argv), time.monotonic())


@pytest.fixture(scope="module")
def calm(_server: FaultyStore) -> str:
    """The run that nothing happens to."""
    ended = pretrain("calm")
    assert ended.code == 0, ended.message
    return f"{RUNS}/calm"


@pytest.mark.parametrize("what", ["*.safetensors", "commit.json"])
def test_the_process_dies_in_the_middle_of_an_upload(
    what: str, store: FaultyStore, calm: str, cost: Cost
) -> None:
    name = f"killed-{uuid4().hex[:8]}"
    processes: list[subprocess.Popen[str]] = []

    def kill(app: Any, environ: Any, start_response: Any) -> Any:
        environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]) // 2)
        processes[0].kill()
        raise ConnectionResetError

    store.fail(kill, method="PUT", key=f"runs/{name}/checkpoints/step_000006/{what}", times=1)
    began = time.monotonic()
    processes.append(begin(name))
    assert end(processes[0], began).code == -9
    assert committed(f"{RUNS}/{name}/checkpoints") == [EVERY]
    again = pretrain(name)
    assert again.code == 0, again.message
    tiny.assert_same(f"{RUNS}/{name}", calm)
    cost(
        f"process dies while {what} is uploaded", "that checkpoint; 3 steps, redone", again.seconds
    )


def test_a_run_among_faults(store: FaultyStore, calm: str, cost: Cost) -> None:
    reads, writes = "GET|HEAD", "PUT|POST"
    among = "runs/among/*"
    for fault, method, key in (
        ("500", reads, "data/manifest.json"),
        ("503", reads, "data/train/*"),
        ("cut answer", reads, "data/validation/*"),
        ("slow", reads, "data/tokenizer.json"),
        ("cut answer", writes, f"{among}config.yaml"),
        ("503", writes, f"{among}/init/*"),
        ("cut request", writes, f"{among}step_000003/*.safetensors"),
        ("slow", writes, f"{among}step_000006/*"),
        ("cut answer", writes, f"{among}step_000009/*.safetensors"),
        ("500", writes, f"{among}step_000012/commit.json"),
        ("cut request", writes, f"{among}/model/*"),
    ):
        store.fail(FAULTS[fault], method=method, key=key, times=2)
    ended = pretrain("among")
    assert ended.code == 0, ended.message
    tiny.assert_same(f"{RUNS}/among", calm)
    cost("500, 503, slow answers, requests and answers cut", "nothing", 0.0)


def test_shards_cannot_be_read_any_more(store: FaultyStore, calm: str, cost: Cost) -> None:
    gone = answer(503)

    def last_commit(app: Any, environ: Any, start_response: Any) -> Any:
        store.fail(gone, method="GET|HEAD", key="data/train/*")
        return app(environ, start_response)

    key = f"runs/starved/checkpoints/step_{EVERY:06d}/commit.json"
    store.fail(last_commit, method="PUT", key=key, times=1)
    ended = pretrain("starved", "train.stream.window_groups=1")
    assert ended.code == 4
    assert "data/train/part-00000.parquet" in ended.message
    kept = max(committed(f"{RUNS}/starved/checkpoints"))
    assert f"last good checkpoint is step {kept}" in ended.message
    store.heal()
    again = pretrain("starved", "train.stream.window_groups=1")
    assert again.code == 0, again.message
    cost("the store gives out no shards", "no committed step; exit 4 names the last", again.seconds)


def test_a_sweep_on_a_bucket(store: FaultyStore, tmp_path: Path) -> None:
    tracking = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    ended = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.sweeping.small", f"root={RUNS}", tracking,
         f"data=s3://{BUCKET}/data", "space={converter.beta: {kind: choice, values: [0.5, 2]}}",
         # Not the cluster of other tests, whose nodes do not know this store.
         "finetune.workers.cluster.address=local"],
        env=os.environ | {"PYTHONPATH": os.getcwd()}, text=True, capture_output=True,
        timeout=2 * PATIENCE_S,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    made = json.loads(ended.stdout.splitlines()[-1])
    assert made["metrics"]["trials/finished"] == 2
    assert Folder.at(made["run"]).exists("report/report.html")
