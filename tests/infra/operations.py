"""What a run asks of its store, each as one function to be disturbed.

The fixtures `store` and `folder` need a `_server`, which a module makes for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import pytest
import torch

from infra.checkpoints import committed, consolidate
from infra.errors import InfraError
from infra.shards import ShardWriter, VocabularyRecord, read_manifest
from infra.storage import Folder
from tests.infra.common import rows_of
from tests.infra.faulty import BUCKET, FaultyStore
from tests.infra.workers import Patient

IDS_NL = np.arange(64 * 8).reshape(64, 8) % 32


@pytest.fixture
def store(_server: FaultyStore) -> Iterator[FaultyStore]:
    with _server.lent() as store:
        yield store


@pytest.fixture
def folder(store: FaultyStore) -> Folder:
    folder = Folder.at(f"s3://{BUCKET}/{uuid4().hex}")
    furnish(folder)
    store.requests.clear()
    return folder


class Operation(NamedTuple):
    """What is done in a folder that `furnish` made, and the requests that it consists of."""

    act: Callable[[Folder], None]
    method: str
    key: str


def furnish(folder: Folder) -> None:
    """Shards, and a checkpoint of step 1."""
    vocabulary = VocabularyRecord(kind="char", sha256="", size=32)
    about = {"length": 8, "source": "here", "split_rule": "none", "blocks": "eos"}
    with ShardWriter(folder / "data", vocabulary=vocabulary, **about) as writer:
        writer.write("train", IDS_NL)
    checkpoints(folder).save(1, tensors(1), {})


def checkpoints(folder: Folder) -> Patient:
    return Patient(folder / "checkpoints", keep=2, max_failures=1)


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((256, 64), float(step)), "step": torch.tensor(step)}


def readable(folder: Folder) -> list[int]:
    """The committed steps, each of which has been read whole and found right."""
    steps = committed(folder / "checkpoints")
    for step in steps:
        held = consolidate(folder / "checkpoints", step, "")
        assert all(torch.equal(held[key], tensor) for key, tensor in tensors(step).items())
    return steps


def read_shard(folder: Folder) -> None:
    manifest = read_manifest(folder / "data")
    np.testing.assert_array_equal(rows_of(folder / "data", manifest, "train"), IDS_NL)


def read_the_manifest(folder: Folder) -> None:
    assert read_manifest(folder / "data").rows("train") == len(IDS_NL)


def list_steps(folder: Folder) -> None:
    assert committed(folder / "checkpoints")[0] == 1


def read_checkpoint(folder: Folder) -> None:
    held = {key: torch.zeros_like(tensor) for key, tensor in tensors(1).items()}
    checkpoints(folder).load(1, held)
    assert held["weight"].eq(1).all()


def write_checkpoint(folder: Folder) -> None:
    """The next one, by a run that has the first."""
    store = checkpoints(folder)
    read_into = {key: torch.zeros_like(tensor) for key, tensor in tensors(1).items()}
    store.load(1, read_into)
    store.save(2, tensors(2), {})


def write_model(folder: Folder) -> None:
    (folder / "model").write_bytes("model.safetensors", b"weights" * 10_000)
    (folder / "model").write_bytes("config.json", b"{}")


OPERATIONS = {
    "read shard": Operation(read_shard, "GET|HEAD", "*.parquet"),
    "read manifest": Operation(read_the_manifest, "GET|HEAD", "*/manifest.json"),
    "list": Operation(list_steps, "GET", ""),
    "read checkpoint": Operation(read_checkpoint, "GET|HEAD", "*.safetensors"),
    "write checkpoint": Operation(write_checkpoint, "PUT|POST", "*.safetensors"),
    "commit checkpoint": Operation(write_checkpoint, "PUT", "*/commit.json"),
    "write model": Operation(write_model, "PUT", "*/model/*"),
}


def failure(operation: Operation, folder: Folder) -> str:
    """The one message of an operation whose store stays as it is."""
    try:
        operation.act(folder)
    except InfraError as error:
        return str(error)
    raise AssertionError("it did not fail")
