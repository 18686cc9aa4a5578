"""A flipped bit of a checkpoint is found, named, and skipped if that is asked for."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from infra import parallel
from infra.checkpoints import Checkpoints, committed, consolidate, drop_damaged
from infra.errors import DataError
from tests.infra.test_checkpoints import FLOAT32, numbers, same, saved, tensors_of
from tests.infra.workers import Patient, Trained, full, in_workers

__all__ = ["saved"]


def flip(file: Path, at: int) -> None:
    """Flip one bit of the byte at this place."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << at % 8
    file.write_bytes(content)


def test_any_flipped_bit_is_found_or_does_not_matter(saved: Path) -> None:
    store = Checkpoints(str(saved.parent), keep=1)
    harmless = []
    for file in saved.iterdir():
        numbers_from = file.stat().st_size - 12 * 4 - 8
        for at in range(file.stat().st_size):
            flip(file, at)
            tensors, message = numbers(0), ""
            try:
                store.load(1, tensors)
            except DataError as error:
                message = str(error)
            flip(file, at)
            if message:
                assert file.name in message
            else:
                assert all(torch.equal(tensors[key], numbers(1)[key]) for key in tensors)
                assert file.suffix == ".json" or at < numbers_from
                harmless.append(at)
    assert harmless  # such as a blank at the end of the header


def three(folder: Path, corrupt: Literal["stop", "skip"]) -> Checkpoints:
    store = Patient(str(folder), keep=3, corrupt=corrupt)
    for step in (1, 2, 3):
        store.save(step, numbers(step), {"step": step})
    for step in (2, 3):
        flip(next((folder / f"step_00000{step}").glob("*.safetensors")), -30)
    return store


def test_a_flipped_bit_stops_the_run_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        three(tmp_path, "stop").resume(numbers(0))
    file = next((tmp_path / "step_000003").glob("*.safetensors"))
    assert caught.value.where == str(file)
    assert "the numbers of a[0,0] do not match their checksum" in caught.value.why
    assert "corrupt=skip" in caught.value.fix
    assert committed(str(tmp_path)) == [1, 2, 3]


def test_damaged_checkpoints_are_skipped_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, tensors = three(tmp_path, "skip"), numbers(0)
    assert store.resume(tensors) == (1, {"step": 1})
    assert torch.equal(tensors["a"], numbers(1)["a"])
    assert committed(str(tmp_path)) == [1]
    assert caplog.text.count("skipped: ") == 2
    drop_damaged(str(tmp_path), 1)
    assert committed(str(tmp_path)) == [1]
    flip(next((tmp_path / "step_000001").glob("*.safetensors")), -30)
    for attempt in (partial(store.resume, tensors), partial(drop_damaged, str(tmp_path), 1)):
        with pytest.raises(DataError, match=r"step_000001.*checksum.*existing=restart") as caught:
            attempt()  # there is none before it
        assert "corrupt=skip" not in str(caught.value)
    assert committed(str(tmp_path)) == [1]


def resume_past_damage_of_one_rank(folder: str) -> tuple[int | None, dict[str, Any]]:
    with parallel.join(FLOAT32) as mesh:
        run = Trained(mesh, FLOAT32)
        store = Checkpoints(folder, keep=9, corrupt="skip")
        for step in (1, 2):
            run.step(step)
            store.save(step, tensors_of(run), {})
        store.wait()
        if parallel.world()[0] == 1:
            flip(next(Path(folder, "step_000002").glob("*-00001.safetensors")), -30)
        dist.barrier()
        step, _ = store.resume(tensors_of(run))
        return step, full(tensors_of(run).items())


def test_what_one_rank_finds_damaged_all_ranks_skip(tmp_path: Path) -> None:
    first, second = in_workers(2, resume_past_damage_of_one_rank, str(tmp_path))
    assert first[0] == second[0] == 1
    same(first[1], second[1])
    read = consolidate(str(tmp_path), 1, "")
    same(first[1], {key: tensor.numpy() for key, tensor in read.items()})


def test_a_checkpoint_from_before_there_were_checksums_opens(saved: Path) -> None:
    commit = json.loads((saved / "commit.json").read_text())
    del commit["sha256"]
    for entry in commit["tensors"].values():
        for chunk in entry["chunks"]:
            del chunk["sha256"]
    (saved / "commit.json").write_text(json.dumps(commit))
    tensors = numbers(0)
    assert Checkpoints(str(saved.parent), keep=1).resume(tensors) == (1, {})
    assert torch.equal(tensors["a"], numbers(1)["a"])
