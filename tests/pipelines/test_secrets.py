"""Credentials come from the environment and go nowhere else."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import head
from infra.storage import Folder
from pipelines import benchmark, evaluate, generate, sweep
from tests.infra.faulty import BUCKET, SECRET, FaultyStore, answer, cut_answer
from tests.pipelines import tiny

TOKEN = "sentinel-of-a-session-token"
PASSWORD = "sentinel-of-a-password"
SIGNATURE = "sentinel-of-a-signature"
SPACE = "{converter.beta: {kind: choice, values: [1, 2]}}"


@pytest.fixture(scope="module")
def store() -> Iterator[FaultyStore]:
    with FaultyStore() as store, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SESSION_TOKEN", TOKEN)
        store.forget_clients()
        yield store


@pytest.mark.parametrize("verb", [*tiny.VERBS, "evaluate", "generate", "sweep", "benchmark"])
@pytest.mark.parametrize(
    "url",
    [
        f"s3://name:{PASSWORD}@bucket/x",
        f"https://name:p@{PASSWORD}@host/x",
        f"https://host/x?X-Amz-Date=1&X-Amz-Signature={SIGNATURE}",
        f"abfs://host/x?sig={SIGNATURE}",
    ],
)
def test_a_url_with_a_credential_is_refused_by_every_verb(
    verb: str, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = {"prepare": "source", "generate": "model", "benchmark": "root"}.get(verb, "data")
    needed = {
        "prepare": ["out=out"],
        "pretrain": ["name=a"],
        "finetune": ["name=a", "init=b"],
        "evaluate": ["name=a", "models={a: b}"],
        "sweep": [
            "name=a",
            "finetune.init=b",
            "space={converter.beta: {kind: choice, values: [1, 2]}}",
        ],
        "benchmark": ["name=a"],
    }
    argv = [verb, *needed.get(verb, []), f"{key}={url}", "--traceback"]
    monkeypatch.setattr("sys.argv", argv)
    others = {"evaluate": evaluate, "generate": generate, "sweep": sweep, "benchmark": benchmark}
    code = (tiny.VERBS | others)[verb].main()
    shown = capsys.readouterr()
    assert code == 2
    assert f"{key}: the URL holds a credential" in shown.err.splitlines()[-1]
    assert "sentinel" not in shown.err + shown.out


def test_a_text_that_speaks_of_a_url_is_a_text() -> None:
    tiny.load("pretrain", "data=d", "name=a", "tracking.experiment=write to https://me@host/x")


def test_a_run_on_a_bucket_shows_no_secret(
    store: FaultyStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not in the bucket, nor in the database, nor on the terminal, though the store fails."""
    shards = Path(tiny.shards(tmp_path / "data"))
    data = Folder.at(f"s3://{BUCKET}/data")
    for file in (path for path in shards.rglob("*") if path.is_file()):
        data.write_bytes(str(file.relative_to(shards)), file.read_bytes())
    store.fail(cut_answer, method="GET|PUT", key="runs/*", times=4)
    root = f"s3://{BUCKET}/runs"
    given = [f"data={data.url}", f"root={root}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    given += ["train.steps=2", "train.validate_every=2", "--traceback"]
    assert tiny.main("pretrain", *given, "name=good") == 0
    store.fail(answer(500), method="PUT|POST", key="runs/bad/model/*")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_retries(), "total_max_attempts", 1)
        store.forget_clients()
        assert tiny.main("pretrain", *given, "name=bad") == 4
    store.heal()
    store.forget_clients()

    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    objects = store.filesystem.find(BUCKET)
    assert any(name.endswith("run.json") for name in objects)
    kept += [store.filesystem.cat_file(name) for name in objects]
    shown = capfd.readouterr()
    for secret in (SECRET, TOKEN):
        assert not any(secret.encode() in content for content in kept)
        assert secret not in shown.out + shown.err


def _retries() -> dict[str, Any]:
    import fsspec

    retries: dict[str, Any] = fsspec.config.conf["s3"]["config_kwargs"]["retries"]
    return retries


def test_a_job_is_submitted_without_them(
    store: FaultyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    run = subprocess.run

    def ray(command: list[str], **options: Any) -> Any:
        if "submit" not in command:
            return run(command, **options)
        asked.append(command)
        return None

    (tmp_path / "token").write_text("token")
    monkeypatch.setattr(subprocess, "run", ray)
    there = head.Head(pid=1, started="", address="http://127.0.0.1:9", folder="")
    monkeypatch.setattr(head.Head, "load", lambda state: there)
    monkeypatch.setattr(head, "_ask", lambda *_: {"driver_exit_code": 0})
    assert head.submit(tmp_path, ["python", "pipelines/pretrain.py", "text8"], tmp_path) == 0
    (command,) = asked
    assert "pipelines/pretrain.py" in command
    runtime = json.loads(command[command.index("--runtime-env-json") + 1])
    assert set(runtime["env_vars"]) <= {"SUBMITTED_COMMIT"}
    assert not any(secret in part for part in command for secret in (SECRET, TOKEN))
