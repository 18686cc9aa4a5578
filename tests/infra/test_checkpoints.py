"""Checkpoints come back bit for bit in any sharding, or do not count, and never run anything."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from infra import checkpoints, dcp, parallel
from infra.checkpoints import Checkpoints, committed, consolidate, optimizer_tensors
from infra.errors import DataError, InfraError
from infra.parallel import ParallelConfig
from infra.storage import Folder, explained
from tests.infra.common import Bomb
from tests.infra.workers import Patient, Toy, Trained, batch, full, in_workers

FLOAT32 = ParallelConfig(compute_dtype="float32", threads=1)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PAUSES_S", ())


def tensors_of(run: Trained) -> dict[str, torch.Tensor]:
    return checkpoints.training_tensors(run.model, run.average, run.optimizer)


def train(folder: str, until: int, save_at: int, die_at: int | None = None) -> dict[str, Any]:
    """Resume from the latest checkpoint, if any, and train; the whole tensors at the end."""
    with parallel.join(FLOAT32) as mesh:
        run, store = Trained(mesh, FLOAT32), Checkpoints(folder, keep=9)
        first = max(store.steps(), default=None)
        if first is not None:
            assert store.load(first, tensors_of(run)) == {"losses": [0.5], "step": first}
        for step in range(first or 0, until):
            if step == die_at:
                store.wait()
                if parallel.world()[0] == parallel.world()[1] - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            run.step(step)
            if step + 1 == save_at:
                store.save(save_at, tensors_of(run), {"losses": [0.5], "step": save_at})
        store.wait()
        return full(tensors_of(run).items())


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not np.array_equal(a[key], b[key])] == []


def test_two_workers_to_one_to_two_bit_for_bit(tmp_path: Path) -> None:
    folder = str(tmp_path)
    two, _ = in_workers(2, train, folder, 2, 2)
    read = consolidate(folder, 2, "")
    same(two, {key: tensor.numpy() for key, tensor in read.items()})
    assert read["model.table.weight"].shape == (11, 8)
    assert len(list((tmp_path / "step_000002").glob("*.safetensors"))) == 2

    one = train(folder, 3, 3)
    back = in_workers(2, train, folder, 3, 3)
    same(one, back[0])
    same(one, back[1])
    assert len(list((tmp_path / "step_000003").glob("*.safetensors"))) == 1
    assert any(not np.array_equal(one[key], two[key]) for key in one)


def test_two_steps_kill_three_steps_equal_five(tmp_path: Path) -> None:
    straight, killed = str(tmp_path / "straight"), str(tmp_path / "killed")
    expected, _ = in_workers(2, train, straight, 5, 2)
    with pytest.raises(RuntimeError):  # the pool's, or the surviving rank's
        in_workers(2, train, killed, 5, 2, 3)
    assert committed(killed) == [2]
    resumed, _ = in_workers(2, train, killed, 5, 2)
    same(expected, resumed)
    assert {key for key in expected if key.startswith("optimizer.")} == {
        f"optimizer.{name}.{part}"
        for name, parameter in Toy().named_parameters()
        if parameter.requires_grad
        for part in ("step", "exp_avg", "exp_avg_sq")
    }
    assert expected["optimizer.scale.step"] == 5
    assert expected["ema_updates"] == 5


def die_while_writing() -> None:
    streamed = Folder.open

    @contextmanager
    def cut(self: Folder, name: str, mode: str = "rb") -> Any:
        with streamed(self, name, mode) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
            yield file

    Folder.open = cut


def die_before_the_commit() -> None:
    Folder.write_bytes = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def save_twice(folder: str, die: Callable[[], None]) -> None:
    store = Checkpoints(folder, keep=2)
    store.save(1, numbers(1), {})
    store.wait()
    die()
    store.save(2, numbers(2), {})
    store.wait()


@pytest.mark.parametrize("die", [die_while_writing, die_before_the_commit])
def test_kill_during_a_save_leaves_the_checkpoint_before(
    die: Callable[[], None], tmp_path: Path
) -> None:
    folder = str(tmp_path)
    with pytest.raises(BrokenProcessPool):
        in_workers(1, save_twice, folder, die)
    assert (tmp_path / "step_000002").exists()
    store = Patient(folder, keep=2)
    assert store.steps() == [1]
    tensors = numbers(0)
    store.load(1, tensors)
    assert torch.equal(tensors["a"], numbers(1)["a"])
    with pytest.raises(DataError, match=r"no committed checkpoint.*Committed steps: 1"):
        store.load(2, tensors)
    store.save(2, numbers(2), {})
    assert store.steps() == [1, 2]
    assert len(Folder.at(folder + "/step_000002").names()) == 2


def numbers(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(4, 3, generator=generator), "b": torch.tensor(seed)}


def test_a_fresh_optimizer_is_described_without_being_changed() -> None:
    def trained(describe: bool) -> dict[str, Any]:
        model = Toy()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            if describe:
                assert "optimizer.mix.weight.step" not in optimizer_tensors(model, optimizer)
            model(*batch(step, 0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return full(model.named_parameters()) | full(optimizer_tensors(model, optimizer).items())

    same(trained(describe=True), trained(describe=False))


def test_save_copies_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    write = dcp.Staged.write
    monkeypatch.setattr(dcp.Staged, "write", lambda self, folder: (go.wait(), write(self, folder)))
    store, tensors, meta = Checkpoints(str(tmp_path), keep=1), numbers(1), {"losses": [1.0]}
    store.save(1, tensors, meta)
    tensors["a"].zero_()
    meta["losses"].append(2.0)
    assert store.steps() == []
    go.set()
    store.wait()
    assert store.steps() == [1]
    assert torch.equal(consolidate(str(tmp_path), 1, "a")[""], numbers(1)["a"])
    assert store.resume(numbers(0)) == (1, {"losses": [1.0]})


def test_the_latest_and_the_milestones_stay_and_the_commit_goes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    removed = []
    remove = Folder.remove
    monkeypatch.setattr(
        Folder,
        "remove",
        lambda self, name="": (removed.append(self.url_of(name)), remove(self, name)),
    )
    folder = Folder.at("memory://retention")
    store = Patient(folder, keep=2, milestone_every=4)
    for step in range(1, 10):
        store.save(step, numbers(step), {})
    assert store.steps() == [4, 8, 9]
    assert folder.names() == ["step_000004", "step_000008", "step_000009"]
    assert [url.rpartition("step_")[2] for url in removed[:2]] == ["000001/commit.json", "000001"]


def test_a_half_written_folder_of_the_past_is_removed(tmp_path: Path) -> None:
    (tmp_path / "step_000001").mkdir()
    (tmp_path / "step_000001" / "stale.safetensors").write_bytes(b"half")
    (tmp_path / "step_000002").mkdir()
    (tmp_path / "step_000002" / "stale.safetensors").write_bytes(b"half")
    (tmp_path / "step_000002" / ".x.safetensors.0a1b2c3d.partial").write_bytes(b"half")
    Patient(str(tmp_path), keep=2).save(2, numbers(2), {})
    assert not (tmp_path / "step_000001").exists()
    assert not (tmp_path / "step_000002" / "stale.safetensors").exists()
    assert len(list((tmp_path / "step_000002").iterdir())) == 2  # the commit and its file


def full_disk(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    write, left = dcp.Staged.write, iter(range(times))

    def refuse(self: dcp.Staged, folder: Folder) -> None:
        if next(left, None) is not None:
            with explained(folder.url):
                raise OSError(errno.ENOSPC, "No space left on device")
        write(self, folder)

    monkeypatch.setattr(dcp.Staged, "write", refuse)


def test_a_failed_write_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PAUSES_S", (0.0, 0.0))
    full_disk(monkeypatch, times=2)
    store = Patient(str(tmp_path), keep=1, max_failures=1)
    store.save(1, numbers(1), {})
    assert store.steps() == [1]


def test_few_failures_warn_and_many_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Patient(str(tmp_path), keep=3, max_failures=2)
    full_disk(monkeypatch, times=1)
    with caplog.at_level(logging.WARNING):
        store.save(1, numbers(1), {})
    assert "checkpoint of step 1 failed, training goes on" in caplog.text
    assert "the disk is full" in caplog.text
    store.save(2, numbers(2), {})  # a good one: the count begins anew
    full_disk(monkeypatch, times=2)
    store.save(3, numbers(3), {})
    with pytest.raises(InfraError, match=r"2 checkpoints in a row.*step 2.*the disk is full"):
        store.save(4, numbers(4), {})
    assert store.steps() == [2]


def fail_on_rank_one(folder: str) -> tuple[list[int], str]:
    write = dcp.Staged.write

    def refuse(self: dcp.Staged, at: Folder) -> None:
        if parallel.world()[0] == 1:
            raise OSError(errno.EIO, "bad cable")
        write(self, at)

    checkpoints.PAUSES_S = ()
    with parallel.join(FLOAT32) as mesh:
        run, store = Trained(mesh, FLOAT32), Checkpoints(folder, keep=1, max_failures=2)
        store.save(1, tensors_of(run), {})
        store.wait()
        dcp.Staged.write = refuse
        store.save(2, tensors_of(run), {})
        run.step(0)  # its collectives run beside those of the writing thread
        store.save(3, tensors_of(run), {})
        with pytest.raises(InfraError) as caught:
            store.wait()
        return store.steps(), str(caught.value)


def test_a_process_that_lost_its_run_commits_nothing(tmp_path: Path) -> None:
    def refuse() -> None:
        raise InfraError("run", "was taken over by another")

    store = Checkpoints(str(tmp_path), keep=1, max_failures=1, permit=refuse)
    store.save(1, {"a": torch.ones(2)}, {})
    with pytest.raises(InfraError, match="taken over by another"):
        store.wait()
    assert committed(str(tmp_path)) == []


def test_a_failure_on_one_rank_is_the_verdict_of_all(tmp_path: Path) -> None:
    for steps, message in in_workers(2, fail_on_rank_one, str(tmp_path)):
        assert steps == [1]
        assert "last good one: step 1" in message
        assert "bad cable" in message


def lists_less(store: Checkpoints) -> None:
    store.steps = lambda: [1]


def sees_damage(store: Checkpoints) -> None:
    def torn(folder: Folder, commit: checkpoints.Commit) -> None:
        if commit.step == 2:
            raise dcp.Damaged(folder.url, "damaged checkpoint: the file is missing")

    checkpoints._must_be_whole = torn


def resume_behind(
    folder: str, behind: int, lag: Callable[[Checkpoints], None], corrupt: Any
) -> tuple[int | None, dict[str, Any]]:
    with parallel.join(FLOAT32) as mesh:
        run, store = Trained(mesh, FLOAT32), Patient(folder, keep=2, corrupt=corrupt)
        for step in (1, 2):
            run.step(step)
            store.save(step, tensors_of(run), {})
        if parallel.world()[0] == behind:
            lag(store)
        step, _ = store.resume(tensors_of(run))
        assert store.last == step
        return step, full(tensors_of(run).items())


@pytest.mark.parametrize(
    ("behind", "lag", "corrupt", "expected"),
    [
        (1, lists_less, "stop", 2),
        (1, sees_damage, "stop", 2),
        (1, sees_damage, "skip", 2),
        (0, sees_damage, "skip", 1),
    ],
)
def test_a_rank_whose_view_of_the_folder_lags_behind(
    behind: int, lag: Callable[[Checkpoints], None], corrupt: str, expected: int, tmp_path: Path
) -> None:
    """As an NFS client's may: all ranks load the step that rank 0 sees, and no mixture of two."""
    resumed = in_workers(2, resume_behind, str(tmp_path), behind, lag, corrupt)
    assert [step for step, _ in resumed] == [expected, expected]
    written = consolidate(str(tmp_path), expected, "")
    for _, tensors in resumed:
        same(tensors, {key: tensor.numpy() for key, tensor in written.items()})


def test_damage_that_rank_0_sees_is_the_verdict_of_all(tmp_path: Path) -> None:
    with pytest.raises(dcp.Damaged, match="the file is missing"):
        in_workers(2, resume_behind, str(tmp_path), 0, sees_damage, "stop")


def save_on_own_disk(folder: str) -> str:
    checkpoints.PAUSES_S = ()
    with parallel.join(FLOAT32) as mesh:
        own = f"{folder}/disk_of_{parallel.world()[0]}"
        store = Checkpoints(own, keep=1, max_failures=1)
        store.save(1, tensors_of(Trained(mesh, FLOAT32)), {})
        with pytest.raises(InfraError) as caught:
            store.wait()
        return str(caught.value)


def test_disks_that_are_not_shared_make_no_checkpoint(tmp_path: Path) -> None:
    messages = in_workers(2, save_on_own_disk, str(tmp_path))
    assert all("-00001.safetensors: damaged checkpoint: the file is missing" in m for m in messages)
    assert committed(str(tmp_path / "disk_of_0")) == []


def test_another_model_is_one_error_that_lists_the_differences(tmp_path: Path) -> None:
    store = Patient(str(tmp_path), keep=1)
    store.save(1, {"a": torch.zeros(2, 3), "b": torch.zeros(1), "c": torch.zeros(4)}, {})
    wanted = {"a": torch.zeros(3, 2), "c": torch.zeros(4).double(), "d": torch.ones(())}
    with pytest.raises(DataError) as caught:
        store.load(1, wanted)
    for difference in (
        "a is F32[2, 3] in the checkpoint and F32[3, 2] in the model",
        "b is only in the checkpoint",
        "c is F32[4] in the checkpoint and F64[4] in the model",
        "d is not in the checkpoint",
    ):
        assert difference in str(caught.value)
    with pytest.raises(DataError, match="no tensor named ema"):
        consolidate(str(tmp_path), 1, "ema.")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Patient(str(tmp_path), keep=1).save(1, numbers(1), {})
    return tmp_path / "step_000001"


def test_a_shard_may_be_a_link_to_another_disk(saved: Path, tmp_path: Path) -> None:
    shard = next(saved.glob("*.safetensors"))
    shard.rename(tmp_path / "moved")
    shard.symlink_to(tmp_path / "moved")
    tensors = numbers(0)
    assert Checkpoints(str(tmp_path), keep=1, corrupt="skip").resume(tensors) == (1, {})
    assert torch.equal(tensors["a"], numbers(1)["a"])


def refused(step_folder: Path) -> str:
    store = Checkpoints(str(step_folder.parent), keep=1)
    messages = []
    for read in (
        lambda: store.load(1, numbers(0)),
        lambda: consolidate(str(step_folder.parent), 1, ""),
    ):
        with pytest.raises(DataError) as caught:
            read()
        messages.append(str(caught.value))
    assert len(set(messages)) == 1
    return messages[0]


def test_a_pickle_in_place_of_a_file_is_refused_and_runs_nothing(saved: Path) -> None:
    trap = saved / "trap"
    shard = next(saved.glob("*.safetensors"))
    pickled = pickle.dumps(Bomb(trap))
    whole = shard.read_bytes()
    shard.write_bytes(pickled.ljust(len(whole), b"."))
    assert "it is not a safetensors file" in refused(saved)
    # Nor where the header's length is made to fit.
    shard.write_bytes((len(whole) - 8).to_bytes(8, "little") + pickled.ljust(len(whole) - 8, b"."))
    assert "it is not a safetensors file" in refused(saved)
    shard.write_bytes(whole)
    (saved / "commit.json").write_bytes(pickled)
    assert "not a commit of this format" in refused(saved)
    assert not trap.exists()


@pytest.mark.parametrize(("second", "said"), [(2, None), (1, "overlap"), (3, "make up the whole")])
def test_chunks_make_up_a_tensor_once(second: int, said: str | None) -> None:
    """Of four rows: two that were covered twice would leave another one as memory had it."""
    chunks = tuple(dcp.Chunk(file="a", offset=(at, 0), shape=(2, 3)) for at in (0, second))
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        dcp.Entry(dtype="F32", shape=(4, 3), chunks=chunks)


def test_damage_is_one_error_that_names_the_file(saved: Path) -> None:
    shard = next(saved.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    assert f"has {len(whole) - 4} bytes instead of {len(whole)}" in refused(saved)
    shard.write_bytes(whole.replace(b'"a[0,0]"', b'"b[0,0]"'))
    assert "it does not hold a[0,0]" in refused(saved)
    shard.write_bytes(whole.replace(b'"data_offsets": [0, 48]', b'"data_offsets": [9, 57]'))
    assert "it is not a safetensors file" in refused(saved)
    shard.unlink()
    assert f"{shard.name}: damaged checkpoint: the file is missing" in refused(saved)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda commit: commit.update(format=2),
        lambda commit: commit.pop("tensors"),
        lambda commit: commit["tensors"]["a"].update(chunks=[]),
        lambda commit: commit["tensors"]["a"].update(dtype="PICKLE"),
        lambda commit: commit["tensors"]["a"]["chunks"][0].update(file="../elsewhere"),
    ],
)
def test_a_spoilt_commit_is_refused(spoil: Callable[[Any], None], saved: Path) -> None:
    commit = json.loads((saved / "commit.json").read_text())
    del commit["sha256"]
    spoil(commit)
    (saved / "commit.json").write_text(json.dumps(commit))
    assert "not a commit of this format" in refused(saved)


def test_what_is_not_a_tensor_is_refused_when_saving(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path), keep=1)
    with pytest.raises(TypeError, match=r"belong into the meta data: \['lr'\]"):
        store.save(1, {"lr": 0.1}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.save(1, numbers(1), {"model": object()})


def test_other_tools_can_read_the_shards(saved: Path) -> None:
    held = load_file(next(saved.glob("*.safetensors")))
    assert held.keys() == {"a[0,0]", "b[]"}
    assert torch.equal(held["a[0,0]"], numbers(1)["a"])


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=st.dictionaries(
        st.text(min_size=1),
        st.tuples(
            st.sampled_from(list(dcp.NAMES)), st.lists(st.integers(0, 4), max_size=4), st.booleans()
        ),
        min_size=1,
        max_size=5,
    ),
    chunk_bytes=st.sampled_from((1, 9, dcp.CHUNK_BYTES)),
)
def test_any_dtype_shape_and_name_comes_back(
    drawn: dict[str, Any], chunk_bytes: int, tmp_path: Path
) -> None:
    tensors = {}
    for key, (dtype, shape, turned) in drawn.items():
        tensor = torch.randint(0, 2, shape).to(dtype)
        tensors[key] = tensor.mT if turned and tensor.dim() > 1 else tensor  # strided as well
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp, "CHUNK_BYTES", chunk_bytes)
        Patient(str(tmp_path), keep=1).save(7, tensors, {})
    back = consolidate(str(tmp_path), 7, "")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert all(back[key].dtype == tensors[key].dtype for key in tensors)
