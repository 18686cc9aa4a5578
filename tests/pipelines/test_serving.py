"""`mlflow models serve` answers with the texts that `generate` draws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dsl.paths import from_dict
from infra import registry, tracking
from infra.storage import Folder
from pipelines import models
from pipelines.model import PARAMS
from pipelines.verb import TrackingConfig
from tests.infra.common import free_port, until
from tests.pipelines.test_model import HYBRID, drawn, saved


@contextmanager
def served(model_uri: str, tracking_uri: str, folder: Path) -> Iterator[str]:
    """The address of a server that answers, as the README starts it."""
    port, log = free_port(), folder / "server.log"
    binaries = str(Path(sys.executable).parent)
    path = os.pathsep.join([binaries, os.environ["PATH"]])
    command = [f"{binaries}/mlflow", "models", "serve", "-m", model_uri, "--env-manager", "local"]
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            cwd=folder,
            env=os.environ | {"PATH": path, "MLFLOW_TRACKING_URI": tracking_uri},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        until(lambda: server.poll() is not None or answers(address))
        assert server.poll() is None, log.read_text()
        yield address
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/ping", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def asked(address: str, **content: Any) -> Any:
    request = urllib.request.Request(
        f"{address}/invocations",
        data=json.dumps(content).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        return json.loads(reply.read())["predictions"]


@pytest.mark.long
def test_a_request_is_answered_with_text(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    run = tracking.start(
        TrackingConfig(), root=str(tmp_path / "runs"), name="made", params={}, tags={},
        config_yaml="",
    )  # fmt: skip
    made = models.register(Folder.at(str(folder)), "tiny", run, tags={"objective": "dsl"})
    registry.set_alias(made.uri, "champion", run.uri)
    with served("models:/tiny@champion", run.uri, tmp_path) as address:
        assert asked(address, inputs=["the "]) == drawn(folder, text="the ")
        for given in ("the ", {"text": ["the "]}, [{"id": "z", "text": "the "}]):
            assert asked(address, inputs=given) == drawn(folder, text="the ")
        split = {"columns": ["id", "text"], "data": [["z", "the "]]}
        assert asked(address, dataframe_split=split) == drawn(folder, text="the ")
        params = {"path": json.dumps(HYBRID), "seed": 2, "temperature": 0.5}
        given = {"text": "a__d", "seed": 2, "temperature": 0.5}
        wanted = drawn(folder, **given, path=from_dict(HYBRID))
        assert asked(address, inputs=["a__d"], params=params) == wanted
        every = {name: default for name, (_, default) in PARAMS.items()}
        assert asked(address, inputs=["the "], params=every) == drawn(folder, text="the ")
        masked = asked(address, inputs=["the "], params={"path": "masked", "budget": 3})
        assert masked == drawn(folder, text="the ", budget=3)
        with pytest.raises(urllib.error.HTTPError) as caught:
            asked(address, inputs=["the "], params={"path": "maskd"})
        assert "Did you mean 'masked'" in caught.value.read().decode()
