"""Tracking against a real database and a real server that dies, comes back, or never was."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import journal, tracking
from infra.errors import ConfigError, DataError, InfraError
from infra.journal import Journal, Logger
from infra.storage import Folder
from infra.tracking import RunHandle, TrackingConfig, connect
from tests.infra.common import MLflowServer, until

PARAMS = {"optim": {"lr": 3e-4, "betas": [0.9, 0.95]}, "init": None, "note": "x" * 7000}
ROOT = Path(__file__).resolve().parents[2]
CONFIG = "optim:\n  lr: 3.0e-4\n"
DATASET = {"name": "topics", "digest": "ab" * 32, "source": "s3://bucket/topics"}


def start(root: Path, name: str, uri: str | None = None, **more: object) -> RunHandle:
    given = {"params": PARAMS, "tags": {"commit": "c0ffee"}, "config_yaml": CONFIG} | more
    return tracking.start(
        TrackingConfig(uri=uri, experiment="toy"), root=str(root), name=name, **given
    )


def history(handle: RunHandle, metric: str = "loss") -> dict[int, float]:
    """The server's values by step; fails where a step is there twice."""
    found = connect(handle.uri).get_metric_history(handle.run_id, metric)
    values = {metric.step: metric.value for metric in found}
    assert len(values) == len(found)
    return values


def run_of(handle: RunHandle):
    return connect(handle.uri).get_run(handle.run_id)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs whose database, slow to be made, the tests of this module share."""
    return tmp_path_factory.mktemp("runs of mine")


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    folder = tmp_path_factory.mktemp("server")
    start(root, "migrates the database")
    server = MLflowServer(folder, f"sqlite:///{root}/mlflow.db")
    yield server
    server.down()


# The journal


def test_journal_holds_what_was_logged(tmp_path: Path) -> None:
    book = Journal(str(tmp_path))
    book.append(1, {"loss": 2.5, "val/loss": math.nan})
    book.append(3, {"loss": math.inf, "low": -math.inf})
    book.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [2.5, "Infinity"]
    rows = journal.read(str(tmp_path))
    assert rows[0]["step"] == 1
    assert math.isnan(rows[0]["val/loss"])
    assert (rows[1]["loss"], rows[1]["low"]) == (math.inf, -math.inf)


@given(total=st.integers(1, 30), cut=st.integers(0, 400), resume=st.integers(0, 30))
def test_a_killed_and_resumed_journal_has_each_step_once(
    tmp_path_factory: pytest.TempPathFactory, total: int, cut: int, resume: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    book = Journal(str(folder))
    for step in range(1, total + 1):
        book.append(step, {"loss": 1 / step})
    book.close()
    file = folder / "metrics.jsonl"
    before = file.read_bytes()
    file.write_bytes(before[: max(len(before) - cut, 0)])
    survived = [row["step"] for row in journal.read(str(folder))]
    book = Journal(str(folder), resume=resume)
    kept = [row["step"] for row in journal.read(str(folder))]
    assert kept == [step for step in survived if step <= resume]
    for step in range(kept[-1] + 1 if kept else 1, total + 3):
        book.append(step, {"loss": 1 / step})
    book.close()
    rows = journal.read(str(folder))
    assert [(row["step"], row["loss"]) for row in rows] == [
        (step, 1 / step) for step in range(1, total + 3)
    ]
    assert file.read_bytes().startswith(before[: len(kept) and before.index(b"\n") + 1])


def test_a_fresh_journal_is_empty(tmp_path: Path) -> None:
    Journal(str(tmp_path)).append(1, {"loss": 1.0})
    Journal(str(tmp_path)).close()
    assert journal.read(str(tmp_path)) == []


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    good = b'{"step": 1, "time": 1.0, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + b'{"step": 2,\n' + good)
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not a line of a journal"):
        Journal(str(tmp_path), resume=5)


def test_what_would_break_the_journal_is_refused(tmp_path: Path) -> None:
    book = Journal(str(tmp_path))
    book.append(4, {"loss": 1.0})
    for step, name in ((4, "loss"), (3, "loss"), (5, "data %"), (5, "step"), (5, "")):
        with pytest.raises(ValueError, match=r"step|metric"):
            book.append(step, {name: 1.0})
    assert [row["step"] for row in journal.read(str(tmp_path))] == [4]


def test_a_line_that_a_full_disk_cuts_is_not_taken_for_written(tmp_path: Path) -> None:
    """A disk may take the first half of a line without an error."""
    book = Journal(str(tmp_path))
    book.append(1, {"loss": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (tmp_path / "metrics.jsonl").stat().st_size + 9
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(InfraError, match="the disk is full"):
            book.append(2, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [row["step"] for row in journal.read(str(tmp_path))] == [1]


def test_journal_in_an_object_store() -> None:
    url = "memory://bucket/runs/one"
    book = Journal(url)
    book.append(1, {"loss": 3.0})
    assert journal.read(url) == []
    book.sync()
    book.append(2, {"loss": 2.0})
    book.sync(every=3600)
    assert [row["step"] for row in journal.read(url)] == [1]
    book.close()
    book = Journal(url, resume=1)
    book.append(2, {"loss": 1.5})
    book.close()
    assert [(row["step"], row["loss"]) for row in journal.read(url)] == [(1, 3.0), (2, 1.5)]


def test_an_upload_that_lingers_is_not_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread's, which began before the one that a checkpoint waits for."""
    url, write, began, calls = "memory://bucket/runs/lingers", Folder.write_bytes, Event(), []

    def lingers(folder: Folder, name: str, content: bytes) -> None:
        calls.append(name)
        if len(calls) == 1:
            began.set()
            time.sleep(0.5)
        write(folder, name, content)

    book = Journal(url)
    book.append(1, {"loss": 3.0})
    monkeypatch.setattr(Folder, "write_bytes", lingers)
    thread = Thread(target=book.sync)
    thread.start()
    began.wait()
    book.append(2, {"loss": 2.0})
    book.sync()
    thread.join()
    assert [row["step"] for row in journal.read(url)] == [1, 2]


def test_a_journal_of_a_run_that_was_taken_over_stays_here(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither its thread, nor a checkpoint, nor the end uploads it over the successor's."""
    handle = RunHandle(folder="memory://bucket/runs/taken", uri="sqlite:///unused.db", run_id=None)

    def refuse() -> None:
        raise InfraError(handle.folder, "the run was taken over")

    log = Logger(Journal(handle.folder, permit=refuse), handle, interval=0.01)
    log.log(1, {"loss": 2.0})
    until(lambda: "the run was taken over" in caplog.text)
    log.sync()
    log.close()
    assert journal.read(handle.folder) == []


# The run


def test_a_checkpoint_can_wait_for_the_journal_to_be_in_its_store() -> None:
    url = "memory://bucket/runs/synced"
    handle = RunHandle(folder=url, uri="sqlite:///unused.db", run_id=None)
    log = Logger(Journal(url), handle, interval=3600)
    log.log(1, {"loss": 2.0})
    log.sync()
    assert [row["step"] for row in journal.read(url)] == [1]
    log.close()


def test_a_run_shows_all_it_was_given(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "bucket")  # addresses stay whole all the same
    sweep = start(root, "sweep")
    handle = start(root, "sweep/trial", dataset={**DATASET, "name": "t" * 600}, parent=sweep.run_id)
    run = run_of(handle)
    assert run.info.status == "RUNNING"
    assert run.data.params["optim.lr"] == "0.0003"
    assert run.data.params["optim.betas"] == "[0.9, 0.95]"
    assert run.data.params["init"] == "null"
    assert run.data.params["note"] == "x" * 6000
    assert run.data.tags["commit"] == "c0ffee"
    assert run.data.tags["mlflow.parentRunId"] == sweep.run_id
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("t" * 500, ("ab" * 32)[:36])
    assert json.loads(data.dataset.source) == {"uri": DATASET["source"]}
    assert json.loads(data.dataset.profile)["digest"] == "ab" * 32
    assert Path(run.info.artifact_uri, "config.yaml").read_text() == CONFIG
    assert Path(run.info.artifact_uri).is_relative_to(root / "artifacts")
    assert (root / "sweep/trial/config.yaml").read_text() == CONFIG
    (tmp_path / "report").mkdir()
    (tmp_path / "report/table.md").write_text("| bpb |")
    tracking.log_artifacts(handle, tmp_path / "report")
    assert Path(run.info.artifact_uri, "report/table.md").read_text() == "| bpb |"
    assert tracking.page(handle) == f"mlflow ui --backend-store-uri 'sqlite:///{root}/mlflow.db'"
    tracking.finish(handle, "FAILED")
    assert run_of(handle).info.status == "FAILED"


def test_a_report_in_a_bucket_reaches_a_server_that_was_away(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Folder.at("memory://bucket/runs/reported/report")
    report.write_bytes("table.md", b"| bpb |")
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_open", lambda *given: 1 / 0)
        handle = start("memory://bucket/runs", "reported", f"sqlite:///{root}/mlflow.db")
        tracking.log_artifacts(handle, report.url)
    run = run_of(tracking.replay(handle.folder))
    assert Path(run.info.artifact_uri, "report/table.md").read_text() == "| bpb |"


def test_many_parameters(root: Path) -> None:
    handle = start(root, "many", params={f"p{i}": i for i in range(250)})
    assert len(run_of(handle).data.params) == 250


def test_resume_is_the_same_run(root: Path) -> None:
    first = start(root, "resumed")
    tracking.finish(first, "KILLED")
    again = start(root, "resumed", params={"optim": {"lr": 1.0}, "new": 1}, tags={"commit": "b"})
    assert again == first
    run = run_of(again)
    assert run.info.status == "RUNNING"
    assert (run.data.params["optim.lr"], run.data.params["new"]) == ("0.0003", "1")
    assert run.data.tags["commit"] == "b"


def test_a_run_resumed_without_its_server_keeps_its_page(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads(Path(start(root, "away").folder, "run.json").read_text())
    monkeypatch.setattr(tracking, "_open", lambda *given: 1 / 0)
    after = json.loads(Path(start(root, "away").folder, "run.json").read_text())
    ids = ("experiment_id", "run_id")
    assert [after[key] for key in ids] == [before[key] for key in ids]
    assert all(after[key] for key in ids)


def test_a_run_whose_id_was_never_written_down_is_found_again(root: Path) -> None:
    first = start(root, "forgotten")
    record = root / "forgotten/run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"run_id": None}))
    assert start(root, "forgotten") == first


def test_a_run_that_its_database_has_lost_is_made_anew(root: Path) -> None:
    """As where the database was removed: the record is all that a run needs."""
    handle = start(root, "lost")
    file = Path(handle.folder, "run.json")
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"key": "another", "run_id": "0" * 32}))
    again = start(root, "lost")
    assert again.run_id not in (None, handle.run_id, "0" * 32)
    assert run_of(again).data.params["optim.lr"] == "0.0003"


def test_metrics_reach_the_run_once_through_kill_and_resume(root: Path) -> None:
    handle = start(root, "killed")
    logger = Logger(Journal(handle.folder), handle, interval=0.05)
    for step in range(1, 8):
        logger.log(step, {"loss": 1 / step} | ({"val": 1.0} if step == 7 else {}))
    until(lambda: 7 in history(handle))
    # Killed here, with the checkpoint of step 4; two lines more were written but not sent.
    Journal(handle.folder, resume=7).append(8, {"loss": 1 / 8})
    logger = Logger(Journal(handle.folder, resume=4), handle, interval=0.05)
    for step in range(5, 13):
        logger.log(step, {"loss": 1 / step, "val": math.nan if step == 12 else 2.0})
    assert logger.close() == 0
    assert history(handle) == {step: 1 / step for step in range(1, 13)}
    values = history(handle, "val")
    assert sorted(values) == [7, 8, 9, 10, 11, 12]
    assert values[7] == 1.0
    assert math.isnan(values[12])


def test_replay_sends_what_is_missing_and_nothing_twice(root: Path) -> None:
    handle = start(root, "replayed")
    book = Journal(handle.folder)
    for step in range(1, 2501):
        book.append(step, {"loss": float(step)})
    book.close()
    tracking.replay(handle.folder)
    tracking.replay(handle.folder)
    assert history(handle) == {step: float(step) for step in range(1, 2501)}


def test_a_batch_whose_answer_was_lost_is_not_sent_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    handle = start(root, "lost answer")
    book = Journal(handle.folder)
    for step in range(1, 4):
        book.append(step, {"loss": 1.0})
    book.close()
    take, sent = MlflowClient.log_batch, []

    def lose(client: MlflowClient, run_id: str, metrics=(), params=(), tags=()) -> None:
        take(client, run_id, metrics, params, tags)
        sent.extend(metric.step for metric in metrics)
        if sent == [1, 2, 3]:
            raise ConnectionError("the answer was lost")

    monkeypatch.setattr(MlflowClient, "log_batch", lose)
    logger = Logger(Journal(handle.folder, resume=3), handle, interval=0.01)
    until(lambda: logger._sender.offset > 0)
    logger.log(4, {"loss": 1.0})
    assert logger.close() == 0
    assert sent == [1, 2, 3, 4]


# The database

OPEN = """
import sys
from infra.tracking import connect

client = connect(sys.argv[1])
client.create_run(client.create_experiment(sys.argv[2]))
client.search_registered_models()
"""


def opening(database: Path, experiment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OPEN, f"sqlite:///{database}", experiment]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_a_database_is_made_once_and_whole(tmp_path: Path) -> None:
    """One process dies while it makes the tables; then three come at the same moment."""
    database = tmp_path / "runs" / "mlflow.db"
    half_made = database.with_name("mlflow.db.new")
    killed = opening(database, "killed")
    until(
        lambda: killed.poll() is not None or (half_made.exists() and half_made.stat().st_size),
        every_s=0.005,
    )
    assert killed.poll() is None, killed.communicate()[1]
    killed.kill()
    killed.communicate()
    assert not database.exists()

    together = [opening(database, f"experiment {nth}") for nth in range(3)]
    said = [process.communicate()[1] for process in together]
    assert [process.returncode for process in together] == [0, 0, 0], said
    assert sum("Creating initial MLflow database tables" in text for text in said) == 1

    found = connect(f"sqlite:///{database}").search_experiments()
    assert {e.name for e in found} == {"Default", *(f"experiment {nth}" for nth in range(3))}
    assert sorted(p.name for p in database.parent.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


# The configuration


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("htp://server:5000", "cannot open htp://server:5000"),
        ("https://me:secret@server", "password"),
        ("http://[server", "not a URL"),
        ("http://server:99999", "not a URL"),
        *((uri, "names no server and no database") for uri in ("", "sqlite:///", "https://")),
    ],
)
def test_an_impossible_uri(tmp_path: Path, uri: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        start(tmp_path, "run", uri)
    assert "secret" not in str(caught.value)


def test_no_database_in_an_object_store() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri: .* no database can be kept"):
        tracking.locate(TrackingConfig(experiment="toy"), "memory://runs")


def test_a_database_of_a_relative_path_is_one_place() -> None:
    uri = tracking.locate(TrackingConfig(uri="sqlite:///some/mlflow.db", experiment="toy"), "runs")
    assert uri == f"sqlite:///{Path('some/mlflow.db').resolve()}"


def test_a_broken_record_is_named(root: Path) -> None:
    handle = start(root, "broken")
    (root / "broken/run.json").write_text("{}")
    with pytest.raises(DataError, match=r"run\.json: key: Field required"):
        tracking.replay(handle.folder)


def test_import_is_light() -> None:
    code = "import sys, infra.tracking, infra.registry; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# The server


def test_a_server_that_dies_comes_back_or_never_was(
    server: MLflowServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One test for the three, as a server takes long to start."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    early = start(tmp_path, "early", server.uri, dataset=DATASET)  # before there is a server
    assert early.run_id is None
    logger = Logger(Journal(early.folder), early, interval=0.05)
    for step in range(1, 51):
        logger.log(step, {"loss": 1 / step})
    assert logger.close() == 50
    assert [row["step"] for row in journal.read(early.folder)] == list(range(1, 51))
    (tmp_path / "report").mkdir()
    (tmp_path / "report/table.md").write_text("| bpb |")
    tracking.log_artifacts(early, tmp_path / "report")
    assert tracking.finish(early) == early
    assert len([r for r in caplog.records if r.name == "infra.tracking"]) == 2
    with pytest.raises(InfraError, match="run the same command again"):
        tracking.replay(early.folder)

    server.up()
    handle = start(tmp_path, "run", server.uri)
    assert handle.run_id in tracking.page(handle)
    logger = Logger(Journal(handle.folder), handle, interval=0.05)
    logger.log(1, {"loss": 1.0})
    until(lambda: 1 in history(handle))
    server.down()
    for step in range(2, 21):
        logger.log(step, {"loss": 1 / step, "nan": math.nan, "inf": math.inf})
    until(lambda: any("safe in the journal" in r.message for r in caplog.records))
    server.up()
    assert logger.close(patience=300) == 0
    tracking.finish(handle)
    assert history(handle) == {step: 1 / step for step in range(1, 21)}
    assert all(math.isnan(value) for value in history(handle, "nan").values())
    assert len(history(handle, "inf")) == 19
    assert run_of(handle).info.status == "FINISHED"

    late = tracking.replay(early.folder)
    assert late == tracking.replay(early.folder)
    assert history(late) == {step: 1 / step for step in range(1, 51)}
    run = run_of(late)
    assert (run.info.status, run.data.params["optim.lr"]) == ("FINISHED", "0.0003")
    names = {file.path for file in connect(late.uri).list_artifacts(late.run_id)}
    assert names == {"config.yaml", "report"}
    client = connect(server.uri)
    experiment = client.get_experiment_by_name("toy").experiment_id
    names = [run.info.run_name for run in client.search_runs([experiment])]
    assert (names.count("early"), names.count("run")) == (1, 1)
