"""What happens to a run: losses that explode, servers that are away, disks that fill up.

Each ends in one message and the right exit code, and the same command goes on from there.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsl.objective import Loss, MDLMObjective
from infra import checkpoints, mixture, storage
from infra.checkpoints import committed
from infra.errors import DataError
from infra.mixture import Mixture
from infra.shards import MANIFEST
from pipelines import pretrain
from pipelines.kinds import MDLM
from tests.pipelines import tiny
from tests.pipelines.tiny import curve


class Poisoned(MDLMObjective):
    """Whose loss, or the gradient of it, is no number from the eighth step on."""

    forwards = 0
    shown = "the loss of step 8 is nan"

    def forward(self, tokens_BL: Tensor, generator: torch.Generator) -> Loss:
        loss = super().forward(tokens_BL, generator)
        self.forwards += self.training
        if self.forwards <= 7 * 2:
            return loss
        return loss._replace(value=self.spoilt(loss.value))

    def spoilt(self, value: Tensor) -> Tensor:
        return value * torch.nan


class Explosive(Poisoned):
    """The loss stays finite: 0 is added, at an infinite slope."""

    shown = "the norm of the gradient of step 8 is "

    def spoilt(self, value: Tensor) -> Tensor:
        return value + (value - value.detach()).sqrt()


@pytest.mark.parametrize(
    ("objective", "log_every"), [(Poisoned, 1), (Explosive, 1), (Poisoned, 99)]
)
def test_a_loss_that_is_no_number_ends_the_run(
    main: Callable[..., tiny.Outcome],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    data: Path,
    objective: type[Poisoned],
    log_every: int,
) -> None:
    """Metrics that are not logged are looked at one step late, and name their own step."""
    monkeypatch.setitem(MDLM.objectives, "mdlm", objective)
    argv = [f"data={data}", f"root={tmp_path}", "name=run", f"train.log_every={log_every}"]
    code, said = main("pretrain", *argv)
    assert code == 2
    assert f"train.optimizer.lr: {objective.shown}" in said
    assert "the last good checkpoint is step 6" in said
    assert "Lower the learning rate" in said
    assert committed(str(tmp_path / "run" / "checkpoints")) == [3, 6]
    steps = [row["step"] for row in curve(tmp_path / "run")]
    assert steps == list(range(1, 8)) if log_every == 1 else max(steps) < 8
    assert not (tmp_path / "run" / "model").exists()


def test_an_mlflow_server_that_does_not_answer(
    main: Callable[..., tiny.Outcome],
    tmp_path: Path,
    data: Path,
    finished: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Training does not care: a warning, the metrics in the journal, exit 0.

    Registering is tried again by the same command, so the run does not count as finished.
    """
    argv = [f"data={data}", f"root={tmp_path}", "name=mdlm", "register=tiny"]
    code, said = main("pretrain", *argv)
    assert code == 0
    assert said.startswith("not registered: http://127.0.0.1:9 does not answer")
    warnings = [record.getMessage() for record in caplog.records]
    assert any("is not on MLflow at http://127.0.0.1:9" in warning for warning in warnings)
    assert curve(tmp_path / "mdlm") == curve(finished)
    assert not (tmp_path / "mdlm" / "result.json").exists()
    assert main("pretrain", *argv) == (0, said)


@pytest.mark.parametrize("verb", ["prepare", "pretrain"])
def test_an_output_folder_that_cannot_be(
    main: Callable[..., tiny.Outcome], tmp_path: Path, data: Path, verb: str
) -> None:
    """Below a file there is no folder, whoever asks."""
    (tmp_path / "file").write_text("in the way")
    place = tmp_path / "file" / "below"
    given = {"prepare": [f"out={place}"], "pretrain": [f"data={data}", f"root={place}", "name=run"]}
    code, said = main(verb, *given[verb])
    assert (code, str(place) in said) == (4, True), said
    assert "a file is where a folder should be. Choose another folder" in said
    assert (tmp_path / "file").read_text() == "in the way"


@contextmanager
def disk_full(monkeypatch: pytest.MonkeyPatch, *places: str) -> Iterator[list[str]]:
    """No room for files whose path has one of these in it; the paths that were refused."""
    refused = []
    replacing = storage._replacing

    @contextmanager
    def full(path: str) -> Iterator[Any]:
        with replacing(path) as file:
            yield file
            if any(place in path for place in places):
                refused.append(path)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_replacing", full)
        patch.setattr(checkpoints, "PAUSES_S", (0.0,))
        yield refused


def test_a_disk_that_is_full_for_a_while(
    main: Callable[..., tiny.Outcome],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    data: Path,
    finished: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Fewer failures in a row than would end a run are warnings, and change nothing else."""
    argv = [f"data={data}", f"root={tmp_path}", "name=run"]
    with disk_full(monkeypatch, "step_000003", "step_000006") as refused:
        code, _ = main("pretrain", *argv)
    assert code == 0
    assert len(refused) == 2 * 2  # each tried twice
    warnings = [r.getMessage() for r in caplog.records if "training goes on" in r.getMessage()]
    failed = [f"checkpoint of step {step} failed" for step in (3, 6)]
    assert [warning.partition(",")[0] for warning in warnings] == failed
    assert all("the disk is full" in warning for warning in warnings)
    assert committed(str(tmp_path / "run" / "checkpoints")) == [9, 12]
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert curve(tmp_path / "run") == curve(finished)


def test_a_disk_that_stays_full(
    main: Callable[..., tiny.Outcome],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    data: Path,
    finished: Path,
) -> None:
    """The run ends, names its last good step, and goes on from there when there is room."""
    argv = [f"data={data}", f"root={tmp_path}", "name=run", "train.checkpoint.every=2"]
    with disk_full(monkeypatch, *(f"step_{step:06d}" for step in (4, 6, 8))):
        code, said = main("pretrain", *argv)
    assert code == 4
    assert "step_000008: 3 checkpoints in a row failed, last good one: step 2." in said
    assert "the disk is full" in said
    assert committed(str(tmp_path / "run" / "checkpoints")) == [2]
    assert main("pretrain", *argv).code == 0
    assert curve(tmp_path / "run") == curve(finished)


def test_a_disk_that_is_full_at_the_end(
    main: Callable[..., tiny.Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path
) -> None:
    argv = [f"data={data}", f"root={tmp_path}", "name=run"]
    with disk_full(monkeypatch, "step_000012"):
        code, said = main("pretrain", *argv)
    assert (code, "the last good checkpoint is step 9" in said) == (4, True), said
    with disk_full(monkeypatch, "/model/"):
        code, said = main("pretrain", *argv)
    assert (code, "the disk is full" in said) == (4, True), said
    assert main("pretrain", *argv).code == 0


def test_a_list_of_checkpoints_that_lags_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path
) -> None:
    """As an NFS client's may: the checkpoint that was just committed is none that failed."""
    monkeypatch.setattr(checkpoints.Checkpoints, "steps", lambda store: [])
    tiny.execute("pretrain", f"data={data}", f"root={tmp_path}", "name=run")


def test_a_disk_that_is_full_while_preparing(
    main: Callable[..., tiny.Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    argv = ["source=cpython", f"out={tmp_path}", "vocabulary={kind: bpe, size: 300}"]
    with disk_full(monkeypatch, "/validation/"):
        code, said = main("prepare", *argv)
    assert (code, "the disk is full. Free some space" in said) == (4, True), said
    assert not (tmp_path / MANIFEST).exists()
    assert main("prepare", *argv).code == 0


@pytest.mark.parametrize("refused", [(), ("step_000003",)])
def test_bad_data_waits_for_the_checkpoint_in_flight(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path, refused: tuple[str, ...]
) -> None:
    """Where that fails, it is still the data that is told of."""
    write = checkpoints.Checkpoints._write

    def slowly(store: checkpoints.Checkpoints, *what: Any) -> None:
        time.sleep(1)
        write(store, *what)

    def bad(order: Mixture, lanes: tuple[int, ...], done: int) -> Iterator[Any]:
        yield from islice(mixture.read(order, lanes, done), 4)
        raise DataError("part-00000.parquet row group 0", "not readable as parquet")

    monkeypatch.setattr(checkpoints.Checkpoints, "_write", slowly)
    argv = [f"data={data}", f"root={tmp_path}", "name=run", "train.checkpoint.max_failures=1"]
    with disk_full(monkeypatch, *refused), tiny.bare(bad), pytest.raises(DataError):
        pretrain.execute(tiny.load("pretrain", *argv))
    assert committed(str(tmp_path / "run" / "checkpoints")) == [3] * (not refused)


@pytest.mark.long
def test_a_corrupt_shard_that_is_skipped(
    main: Callable[..., tiny.Outcome], tmp_path: Path, data: Path
) -> None:
    """With a sound one to fill in, the run goes on and counts the rows; else it stops, and says
    which file and where. With the shard mended, the same command goes on."""
    copy = shutil.copytree(data, tmp_path / "shards")
    (shard,) = (copy / "train").glob("part-*")
    content = bytearray(shard.read_bytes())
    content[100] ^= 255  # in the first row group; sizes and footer stay
    shard.write_bytes(content)
    argv = [f"data={copy}", f"root={tmp_path}", "train.steps=150", "train.checkpoint.every=50"]
    code, said = main("pretrain", *argv, "name=stop")
    assert (code, f"{shard.name} row group 0: not readable" in said) == (3, True), said
    assert main("pretrain", *argv, "name=skip", "train.stream.corrupt=skip").code == 0
    skipped = [row["data/skipped_rows"] for row in curve(tmp_path / "skip")]
    assert skipped[-1] > 0
    assert skipped == sorted(skipped)
    shutil.copy(data / "train" / shard.name, shard)
    assert main("pretrain", *argv, "name=stop").code == 0


def test_a_learning_rate_beyond_all_bounds(
    main: Callable[..., tiny.Outcome], tmp_path: Path, data: Path
) -> None:
    argv = [f"data={data}", f"root={tmp_path}", "name=run", "train.optimizer.lr=1e30"]
    code, said = main("pretrain", *argv)
    assert (code, "of step 2 is inf; there is no checkpoint" in said) == (2, True), said
    assert not (tmp_path / "run" / "result.json").exists()
