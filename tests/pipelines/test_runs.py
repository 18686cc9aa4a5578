"""Run directories: one process at a time, and nothing left of what could not begin."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from infra import cluster, tracking
from infra.checkpoints import committed
from infra.cluster import Revision
from infra.config import digest
from infra.errors import InfraError
from infra.lease import Lease, held
from infra.preemption import Terminated
from infra.storage import Folder
from infra.tracking import RunHandle
from pipelines.runs import Run
from pipelines.training import launch
from pipelines.training.launch import TrainingTask
from tests.pipelines import tiny


def moved(run: Path, root: Path) -> Path:
    """A copy of a run in another folder, which it takes for its own."""
    copy = Path(shutil.copytree(run, root / run.name))
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(str(run.parent), str(root)))
    return copy


def test_a_second_submission_is_refused(
    main: Callable[..., tiny.Outcome], tmp_path: Path, data: Path
) -> None:
    with held(Folder.at(str(tmp_path / "run"))):
        code, said = main("pretrain", f"data={data}", f"root={tmp_path}", "name=run")
    assert code == 4
    assert f"{tmp_path / 'run'}: is being written by process {os.getpid()} on " in said
    assert "Wait for it, stop it, or choose another name" in said
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_is_followed_at_once(tmp_path: Path, data: Path) -> None:
    argv = [f"data={data}", f"root={tmp_path}", "name=run"]
    command = [sys.executable, "-m", "tests.pipelines.tiny", "--kill-at", "5", "pretrain", *argv]
    killed = subprocess.run(command, stderr=subprocess.DEVNULL, timeout=500)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / ".run.lease").exists()
    tiny.execute("pretrain", *argv)
    assert sorted(os.listdir(tmp_path)) == ["run"]


@pytest.mark.parametrize(
    ("verb", "given", "code"),
    [
        ("pretrain", "init=ROOT/nothing", 3),
        ("finetune", "init=ROOT/nothing", 3),
        ("pretrain", "tracking.uri=gopher://server", 2),
        ("pretrain", "train.stream.rows_per_microbatch=100000", 3),
    ],
)
def test_what_could_not_begin_leaves_nothing(
    main: Callable[..., tiny.Outcome],
    tmp_path: Path,
    data: Path,
    verb: str,
    given: str,
    code: int,
) -> None:
    argv = [f"data={data}", f"root={tmp_path}", "name=run", "init=scratch"]
    found, said = main(verb, *argv, given.replace("ROOT", str(tmp_path)))
    assert found == code, said
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_taken_over_is_left_alone(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by another process while this one stood still, in the checkpoint of step 6."""
    confirm, asked = Lease.confirm, []

    def taken(lease: Lease) -> None:
        asked.append(lease)
        if len(asked) > 3:  # when the journal was opened, before the checkpoint of step 3, in 6
            lease.folder.remove(lease.name)
            lease.folder.write_bytes("000009.json", b'{"holder": "another"}')
        confirm(lease)

    monkeypatch.setattr(Lease, "confirm", taken)
    with pytest.raises(InfraError, match="the run was taken over by"):
        tiny.execute("pretrain", f"data={data}", f"root={tmp_path}", "name=run")
    run = tmp_path / "run"
    assert committed(str(run / "checkpoints")) == [3]
    assert json.loads((run / "run.json").read_text())["status"] == "RUNNING"
    assert not (run / "model").exists()
    assert not (run / "result.json").exists()


def test_a_run_that_was_taken_over_while_it_registered_is_not_called_finished(
    tmp_path: Path, data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process may have begun it anew."""
    run = moved(finished, tmp_path)
    (run / "result.json").unlink()

    def taken(task: TrainingTask, run: Run, result: object) -> dict[str, str]:
        run.lease.folder.write_bytes("000009.json", b'{"holder": "another"}')
        return {}

    monkeypatch.setattr(TrainingTask, "register", taken)
    with pytest.raises(InfraError, match="the run was taken over by"):
        tiny.execute("pretrain", f"data={data}", f"root={tmp_path}", "name=mdlm")
    assert not (run / "result.json").exists()


@pytest.mark.parametrize("taken", [False, True])
def test_what_fails_to_begin_removes_its_own_run_alone(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """Another process may have taken the run over meanwhile, and written there."""
    run = tmp_path / "run"

    def fail(task: TrainingTask, folder: Folder) -> None:
        if taken:
            (lease,) = (tmp_path / ".run.lease").iterdir()
            lease.rename(lease.with_name("000009.json"))
            lease.with_name("000009.json").write_text('{"holder": "another"}')
            folder.write_bytes("run.json", b"{}")
        raise InfraError("memory://data", "the store does not answer")

    monkeypatch.setattr(TrainingTask, "prepare", fail)
    with pytest.raises(InfraError, match="the store does not answer"):
        tiny.execute("pretrain", f"data={data}", f"root={tmp_path}", "name=run")
    assert sorted(os.listdir(run) if run.exists() else []) == ["config.yaml", "run.json"] * taken


def test_what_fails_to_begin_again_removes_nothing(
    tmp_path: Path, data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where the record of the run is gone, as the message about a damaged one suggests."""
    run = moved(finished, tmp_path)
    (run / "result.json").unlink()
    (run / "run.json").unlink()

    def fail(task: TrainingTask, folder: Folder) -> None:
        raise InfraError("memory://data", "the store does not answer")

    monkeypatch.setattr(TrainingTask, "prepare", fail)
    with pytest.raises(InfraError, match="the store does not answer"):
        tiny.execute("pretrain", f"data={data}", f"root={tmp_path}", "name=mdlm")
    assert run.exists()
    tiny.assert_same(run, finished)


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), Terminated(), KeyboardInterrupt()], ids=repr
)
def test_the_first_error_is_told_though_its_record_fails(
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
) -> None:
    def fail(task: TrainingTask, run: Run) -> None:
        monkeypatch.setattr(tracking, "finish", away)
        raise error

    def away(handle: RunHandle, status: str) -> None:
        raise InfraError(handle.folder, "the store does not answer")

    monkeypatch.setattr(TrainingTask, "work", fail)
    with pytest.raises(type(error)) as caught:
        tiny.execute("pretrain", f"data={data}", f"root={tmp_path}", "name=run")
    assert caught.value is error
    assert "the end of the run is not recorded" in caplog.text
    assert "the store does not answer" in caplog.text


def test_the_same_command_sends_a_finished_run_once_its_server_is_back(
    tmp_path: Path,
    data: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    record = moved(finished, tmp_path) / "run.json"
    argv = [f"data={data}", f"root={tmp_path}", "name=mdlm"]
    assert tiny.execute("pretrain", *argv)["run_id"] is None
    assert "run the same command again" in caplog.text
    caplog.clear()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    record.write_text(record.read_text().replace("http://127.0.0.1:9", uri))
    made = tiny.execute("pretrain", *argv)
    client = tracking.connect(uri)
    assert client.get_run(made["run_id"]).info.status == "FINISHED"
    assert len(client.get_metric_history(made["run_id"], "loss")) == tiny.STEPS
    monkeypatch.setattr(tracking, "replay", lambda folder: 1 / 0)
    assert tiny.execute("pretrain", *argv) == made
    record.write_text("{}")
    assert tiny.execute("pretrain", *argv) == made
    assert "run.json: key: Field required" in caplog.text


def test_a_restart_that_was_cut_off_can_be_repeated(
    tmp_path: Path, data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever file a removal begins with, the rest is still known for a run."""
    run = Path(shutil.copytree(finished, tmp_path / "mdlm"))
    argv = [f"data={data}", f"root={tmp_path}", "name=mdlm", "existing=restart"]

    remove = Folder.remove

    def cut_off(folder: Folder, name: str = "") -> None:
        if folder.path != str(run):  # it is the lease
            remove(folder, name)
            return
        with suppress(OSError):
            (run / name / "config.yaml").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "remove", cut_off)
        with pytest.raises(KeyboardInterrupt):
            tiny.execute("pretrain", *argv)
    tiny.execute("pretrain", *argv)
    tiny.assert_same(run, finished)


def test_a_restart_from_within_the_run_directory_is_refused_and_loses_nothing(
    main: Callable[..., tiny.Outcome],
    tmp_path: Path,
    data: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "mdlm"))
    monkeypatch.chdir(run / "checkpoints")
    argv = [f"data={data}", f"root={tmp_path}", "name=mdlm", "existing=restart"]
    code, said = main("pretrain", *argv)
    assert code == 4
    assert f"{run}: it cannot be removed, as this process works in it" in said
    assert sorted(run.rglob("*")) == sorted(
        run / p.relative_to(finished) for p in finished.rglob("*")
    )


def test_what_a_restart_leaves_when_it_is_cut_off_is_not_taken_for_finished(
    tmp_path: Path, data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor would a run that resumes from there keep the model of other checkpoints."""
    run, remove, left = moved(finished, tmp_path), Folder.remove, [set(os.listdir(finished))]

    def noted(folder: Folder, name: str = "") -> None:
        remove(folder, name)
        if folder.path == str(run) and run.exists() and "config.yaml" in os.listdir(run):
            left.append(set(os.listdir(run)))

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "remove", noted)
        argv = [f"data={data}", f"root={tmp_path}", "name=mdlm", "existing=restart"]
        tiny.execute("pretrain", *argv)
    whole, wiped = left[0], left[1 : left.index({"config.yaml"}) + 1]
    assert len(wiped) >= len(whole) - 1 > 5
    assert all("result.json" not in names for names in wiped)
    assert all("checkpoints" in names for names in wiped if "model" in names)


def test_a_model_that_a_killed_attempt_began_is_written_anew(
    tmp_path: Path, data: Path, finished: Path
) -> None:
    """A kill leaves a file under another name, with which the registry would not take the model."""
    run = moved(finished, tmp_path)
    for name in ("result.json", "model/config.json", "model/model.safetensors"):
        (run / name).unlink()
    (run / "model" / ".model.safetensors.0a1b2c3d.partial").write_bytes(b"half")
    (run / ".metrics.jsonl.0a1b2c3d.partial").write_bytes(b"half")
    tiny.execute("pretrain", f"data={data}", f"root={tmp_path}", "name=mdlm")
    for place in ("model", "."):
        assert sorted(os.listdir(run / place)) == sorted(os.listdir(finished / place))


def test_a_model_outlives_its_checkpoints(
    tmp_path: Path, data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be deleted to save room; the model can be registered without training again."""
    run = moved(finished, tmp_path)
    (run / "result.json").unlink()  # as where it has another `register` than is asked for now
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(launch, "on_cluster", lambda *_: pytest.fail("it is trained again"))
    made = tiny.execute("pretrain", f"data={data}", f"root={tmp_path}", "name=mdlm")
    assert made["model"] == str(run / "model")
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("left", [0, 5])
def test_the_metrics_of_a_result_are_those_of_the_last_step(
    tmp_path: Path, data: Path, finished: Path, left: int
) -> None:
    """They are lost where a bucket took the last checkpoint, but not the journal."""
    run = moved(finished, tmp_path)
    (run / "result.json").unlink()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:left]))
    made = tiny.execute("pretrain", f"data={data}", f"root={tmp_path}", "name=mdlm")
    assert made["metrics"] == {}


def test_every_milestone_is_a_checkpoint_that_stays(tmp_path: Path, data: Path) -> None:
    """Also where it is no multiple of the steps between two checkpoints, here 3."""
    kept = ["train.checkpoint.milestone_every=5", "train.checkpoint.keep=1"]
    tiny.execute("pretrain", f"data={data}", f"root={tmp_path}", "name=run", *kept)
    assert committed(str(tmp_path / "run" / "checkpoints")) == [5, 10, 12]


def test_a_run_says_where_it_came_from(
    tmp_path: Path, data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cluster.COMMIT_VARIABLE, str(Revision("c0ffee", True)))
    told = {"metadata": {"job_submission_id": "job-1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(told))
    init, uri = str(finished / "model"), f"sqlite:///{tmp_path}/mlflow.db"
    argv = [f"data={data}", f"root={tmp_path}", "name=run", f"init={init}", f"tracking.uri={uri}"]
    made = tiny.execute("finetune", *argv)
    tags = tracking.connect(uri).get_run(made["run_id"]).data.tags
    expected = {
        "verb": "finetune",
        "commit": "c0ffee",
        "dirty": "true",
        "config_hash": digest(tiny.load("finetune", *argv)),
        "ray_job_id": "job-1",
        "parent_model": init,
    }
    assert {name: tags.get(name) for name in expected} == expected
