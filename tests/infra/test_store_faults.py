"""A store that fails for a moment is waited for; one that stays so is one message, and whatever
happens, what can be read is whole. Every fault against every operation: tests/faults/test_store.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import fsspec
import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor

from infra import checkpoints, dcp, parallel, storage
from infra.checkpoints import Checkpoints
from infra.errors import InfraError
from infra.parallel import ParallelConfig
from infra.storage import Folder
from tests.infra import operations
from tests.infra.faulty import FAULTS, FaultyStore, answer, cut_answer, cut_request, slow
from tests.infra.operations import OPERATIONS, folder, store
from tests.infra.workers import Patient, in_workers

__all__ = ["folder", "store"]


@pytest.fixture(scope="module")
def _server() -> Iterator[FaultyStore]:
    with FaultyStore() as store:
        yield store


@pytest.fixture
def impatient(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts and no pauses, or a lasting fault would take its half a minute."""
    retries = fsspec.config.conf["s3"]["config_kwargs"]["retries"]
    monkeypatch.setitem(retries, "total_max_attempts", 2)
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    monkeypatch.setattr(storage, "READS", 1)
    monkeypatch.setattr(checkpoints, "PAUSES_S", ())
    store.forget_clients()


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("503", "read shard"),
        ("cut answer", "read shard"),
        ("slow", "read manifest"),
        ("500", "list"),
        ("cut answer", "read checkpoint"),
        ("cut request", "write checkpoint"),
        ("cut answer", "write checkpoint"),
        ("500", "commit checkpoint"),
        ("cut request", "write model"),
    ],
)
def test_a_moment_of_trouble_is_survived(
    fault: str, name: str, store: FaultyStore, folder: Folder
) -> None:
    operation = OPERATIONS[name]
    rule = store.fail(FAULTS[fault], method=operation.method, key=operation.key, times=1)
    operation.act(folder)
    assert rule.hits == 1
    assert operations.readable(folder)[0] == 1


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("503", "read shard"),
        ("500", "read manifest"),
        ("503", "list"),
        ("cut answer", "read checkpoint"),
        ("cut request", "write checkpoint"),
        ("503", "commit checkpoint"),
        ("cut request", "write model"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_lasting_trouble_is_one_message(
    fault: str, name: str, store: FaultyStore, folder: Folder
) -> None:
    folder = Folder.at(folder.url)
    operation = OPERATIONS[name]
    store.fail(FAULTS[fault], method=operation.method, key=operation.key)
    message = operations.failure(operation, folder)
    assert message.count("the store does not answer") == 1
    assert folder.url in message
    if operation.act is operations.write_checkpoint:
        assert "last good one: step 1" in message
    store.heal()
    assert operations.readable(folder) == [1]
    assert not folder.exists("model/model.safetensors")


def test_a_reader_sees_whole_checkpoints_only(store: FaultyStore, folder: Folder) -> None:
    """It looks before every single request that changes something."""
    seen = []

    def look(app: Any, environ: Any, start_response: Any) -> Any:
        seen.append(operations.readable(folder))
        return app(environ, start_response)

    store.fail(cut_request, method="PUT", key="*/step_000002/*", times=1)
    store.fail(cut_answer, method="POST", key="*/step_000003/*", times=1)
    store.fail(look, method="PUT|POST|DELETE")
    writer = Patient(folder / "checkpoints", keep=1)
    for step in (2, 3):
        writer.save(step, operations.tensors(step), {})
    assert [steps for n, steps in enumerate(seen) if steps not in seen[:n]] == [
        [1], [1, 2], [2], [2, 3], [3],
    ]  # fmt: skip


@pytest.mark.usefixtures("impatient")
def test_a_put_that_is_cut_leaves_what_was_there(store: FaultyStore, folder: Folder) -> None:
    folder = Folder.at(folder.url)
    folder.write_bytes("file", b"old")
    store.fail(cut_request, method="PUT")
    with pytest.raises(InfraError), folder.open("file", "wb") as file:
        file.write(b"new" * 2**20)
    with pytest.raises(InfraError):
        folder.write_bytes("file", b"new" * 2**20)
    assert folder.read_bytes("file") == b"old"
    assert store.unfinished(folder) == []


def test_retention_on_a_bucket(store: FaultyStore, folder: Folder) -> None:
    writer = Patient(folder / "kept", keep=2, milestone_every=4)
    for step in range(1, 8):
        writer.save(step, operations.tensors(step), {})
    assert (folder / "kept").names() == ["step_000004", "step_000006", "step_000007"]
    assert writer.steps() == [4, 6, 7]
    assert store.unfinished(folder) == []


def test_one_upload_at_a_time_beside_the_training(store: FaultyStore, folder: Folder) -> None:
    store.fail(slow(0.5), method="PUT", key="*/checkpoints/*")
    writer = Checkpoints(folder / "checkpoints", keep=9)
    writer.save(2, operations.tensors(2), {})
    assert writer.steps() == [1]  # it is still on its way
    writer.save(3, operations.tensors(3), {})
    assert writer.steps() == [1, 2]
    writer.wait()
    assert writer.steps() == [1, 2, 3]
    order = [r.key.split("/")[2] for r in store.requests if r.method in ("PUT", "POST")]
    assert order == sorted(order)


WEIGHT = torch.arange(2.0**18).view(1024, 256)


def move(environment: dict[str, str], folder: Folder) -> None:
    """Two ranks: save and load in halves, and load what one process has written."""
    os.environ.update(environment)
    with parallel.join(ParallelConfig(compute_dtype="float32", threads=1)) as mesh:
        together = Patient(folder / "two", keep=1)
        together.save(1, {"weight": distribute_tensor(WEIGHT, mesh, [Shard(0)])}, {})
        for store in (together, Checkpoints(folder / "one", keep=1)):
            held = {"weight": distribute_tensor(torch.zeros_like(WEIGHT), mesh, [Shard(0)])}
            store.load(1, held)
            assert torch.equal(parallel.full(held["weight"]), WEIGHT)


def test_each_rank_moves_its_own_part_only(
    store: FaultyStore, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dcp, "CHUNK_BYTES", WEIGHT.nbytes // 8)
    Patient(folder / "one", keep=1).save(1, {"weight": WEIGHT}, {})
    store.requests.clear()
    in_workers(2, move, store.environment, folder)
    sent = [r.sent for r in store.requests if r.key.endswith(".safetensors") and r.sent]
    assert sum(sent) == pytest.approx(WEIGHT.nbytes, rel=0.01)
    assert max(sent) == pytest.approx(WEIGHT.nbytes / 2, rel=0.01)
    for written_by in ("one", "two"):
        key = f"*/{written_by}/*.safetensors"
        got = [r.received for r in store.requests if fnmatch(r.key, key) and r.method == "GET"]
        assert sum(got) == pytest.approx(WEIGHT.nbytes, rel=0.01)
        assert max(got) == WEIGHT.nbytes / (8 if written_by == "one" else 2)


def test_a_store_that_is_away_from_the_start(
    store: FaultyStore, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store.forget_clients()
    with pytest.raises(InfraError, match="s3://bucket/x/a: the store does not answer"):
        Folder.at("s3://bucket/x").read_bytes("a")
    with pytest.raises(InfraError, match="s3://bucket/x/a: the store does not answer"):
        Folder.at("s3://bucket/x").exists("a")


def test_a_list_of_503_is_not_an_empty_folder(
    store: FaultyStore, folder: Folder, impatient: None
) -> None:
    """Or a run would begin anew over its checkpoints."""
    folder = Folder.at(folder.url)
    store.fail(answer(503), method="GET|HEAD")
    for ask in (folder.names, lambda: folder.exists("data/manifest.json")):
        with pytest.raises(InfraError, match="does not answer"):
            ask()
