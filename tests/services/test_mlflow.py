"""MLflow on PostgreSQL behind passwords: users, and a database that is killed under a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from safetensors.numpy import load_file, save_file

from infra import registry, tracking
from infra.errors import InfraError
from infra.journal import Journal, Logger
from infra.tracking import RunHandle, TrackingConfig, connect
from tests.infra.common import until
from tests.services import mlflow_server
from tests.services.debian import Postgres
from tests.services.mlflow_server import DeployedServer

OWNER, GUEST = ("jobs", "password-of-jobs"), ("guest", "password-of-guest")
CODE = """
import mlflow


class Model(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return model_input


mlflow.models.set_model(Model())
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeployedServer]:
    with mlflow_server.deployed(tmp_path_factory.mktemp("server")) as found:
        for user in (OWNER, GUEST):
            found.add_user(*user)
        yield found


@pytest.fixture
def database(server: DeployedServer) -> Postgres:
    return server.database


As = Callable[[tuple[str, str]], None]


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch) -> As:
    """`as_user(user)`: from here on the calls to MLflow come from that one; at first, the owner."""

    def become(user: tuple[str, str]) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user[0])
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", user[1])

    # Here a server that does not answer at once is busy, and no fault of what is tested.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "300")
    become(OWNER)
    return become


def start(server: DeployedServer, root: Path, name: str, **more: Any) -> RunHandle:
    given = {"experiment": "toy", "params": {"lr": 3e-4}, "tags": {"commit": "c0ffee"}} | more
    config = TrackingConfig(uri=server.uri, experiment=given.pop("experiment"))
    return tracking.start(config, root=str(root), name=name, config_yaml="lr: 3.0e-4\n", **given)


def train(handle: RunHandle, steps: int) -> None:
    """Log what training would."""
    logger = Logger(Journal(handle.folder), handle, interval=0.05)
    for step in range(1, steps + 1):
        logger.log(step, {"loss": 1 / step, "grad_norm": step / 8})
    logger.close(patience=300)


def history(handle: RunHandle, metric: str) -> list[tuple[int, float]]:
    """What the server holds of a metric, in the order of its steps."""
    found = connect(handle.uri).get_metric_history(handle.run_id, metric)
    return sorted((one.step, one.value) for one in found)


def runs(server: DeployedServer, experiment: str, **matching: str) -> list[Any]:
    """The runs of an experiment whose tags or attributes match."""
    client = connect(server.uri)
    found = client.get_experiment_by_name(experiment)
    query = " and ".join(f"{key} = '{value}'" for key, value in matching.items())
    return list(client.search_runs([found.experiment_id], query))


@pytest.fixture
def register(tmp_path: Path) -> Any:
    """`register(handle, name)`: a model of one tensor, as a new version of `name`."""
    weights = tmp_path / "weights"
    weights.mkdir()
    save_file({"weight": np.arange(4.0)}, weights / "model.safetensors")
    code = tmp_path / "serve.py"
    code.write_text(CODE)

    def register(handle: RunHandle, name: str) -> registry.ModelVersion:
        return registry.register(
            code=code, folder=weights, name=name, run_id=str(handle.run_id), uri=handle.uri,
            requirements=["mlflow"],
        )  # fmt: skip

    return register


def test_the_server_answers_to_users_and_to_its_own_names(server: DeployedServer) -> None:
    experiments = f"{server.uri}/api/2.0/mlflow/experiments/search?max_results=9"
    ask = partial(requests.get, experiments, timeout=300)
    assert ask().status_code == 401
    assert ask(auth=(OWNER[0], GUEST[1])).status_code == 401
    assert ask(auth=OWNER).status_code == 200
    assert ask(auth=OWNER, headers={"Host": "elsewhere.example"}).status_code == 403
    # A probe of Kubernetes has no user, and names the pod by its address.
    health = requests.get(f"{server.uri}/health", headers={"Host": "10.0.0.7:5000"}, timeout=300)
    assert health.status_code == 200


def test_everything_is_in_postgresql(
    server: DeployedServer, database: Postgres, as_user: As, tmp_path: Path
) -> None:
    handle = start(server, tmp_path, "stored")
    train(handle, 3)
    count = f"select count(*) from metrics where run_uuid = '{handle.run_id}'"
    assert database.sql(count, "mlflow") == "6"
    assert set(database.sql("select username from users", "mlflow").split()) == {
        "admin", OWNER[0], GUEST[0],
    }  # fmt: skip


def test_a_run_and_a_registration(
    server: DeployedServer, as_user: As, tmp_path: Path, register: Any
) -> None:
    handle = start(server, tmp_path, "one")
    train(handle, 30)
    made = register(handle, "dsl-one")
    assert tracking.finish(handle) == handle
    assert history(handle, "loss") == [(step, 1 / step) for step in range(1, 31)]
    run = connect(server.uri).get_run(handle.run_id)
    assert (run.info.status, run.data.params, run.data.tags["commit"]) == (
        "FINISHED", {"lr": "0.0003"}, "c0ffee",
    )  # fmt: skip
    assert (made.uri, made.run_id, made.aliases) == (
        "models:/dsl-one/1", handle.run_id, ("candidate",),
    )  # fmt: skip
    with registry.downloaded(made.candidate_uri, server.uri) as folder:
        assert load_file(folder / "model.safetensors")["weight"].tolist() == [0, 1, 2, 3]


def test_a_sweep_is_nested_runs(server: DeployedServer, as_user: As, tmp_path: Path) -> None:
    """Trials that start in the same moment; each is below the sweep, with its own metrics."""
    sweep = start(server, tmp_path, "sweep", experiment="sweeps")

    def trial(number: int) -> RunHandle:
        handle = start(
            server, tmp_path / "trials", f"trial-{number}",
            experiment="sweeps", parent=sweep.run_id, params={"trial": number},
        )  # fmt: skip
        train(handle, 10 + number)
        return tracking.finish(handle)

    with ThreadPoolExecutor(4) as pool:
        handles = list(pool.map(trial, range(6)))
    tracking.finish(sweep)
    found = runs(server, "sweeps", **{"tags.mlflow.parentRunId": str(sweep.run_id)})
    assert {run.info.run_id for run in found} == {handle.run_id for handle in handles}
    assert {run.info.status for run in found} == {"FINISHED"}
    assert {run.data.params["trial"] for run in found} == set("012345")
    for number, handle in enumerate(handles):
        assert [step for step, _ in history(handle, "loss")] == list(range(1, 11 + number))


def test_another_user_reads_and_changes_nothing(
    server: DeployedServer, as_user: As, tmp_path: Path, register: Any
) -> None:
    """Neither the model nor the run of the owner, who may go on."""
    owned = start(server, tmp_path, "owned")
    made = register(owned, "dsl-owned")

    as_user(GUEST)
    own = start(server, tmp_path / "guest", "own", experiment="guest")
    assert registry.describe(made.uri, server.uri) == made
    with registry.downloaded(made.uri, server.uri) as folder:
        assert load_file(folder / "model.safetensors")["weight"].tolist() == [0, 1, 2, 3]
    client = connect(server.uri)
    for touch in (
        lambda: register(own, "dsl-owned"),
        lambda: registry.set_alias(made.uri, "champion", server.uri),
        lambda: registry.tag(made.uri, {"step": "0"}, server.uri),
    ):
        with pytest.raises(InfraError, match=r"refused or did not answer \(.*Permission denied"):
            touch()
    for touch in (
        lambda: client.delete_registered_model("dsl-owned"),
        lambda: client.delete_model_version("dsl-owned", "1"),
        lambda: client.rename_registered_model("dsl-owned", "stolen"),
        lambda: client.log_metric(owned.run_id, "loss", 0.0),
        lambda: client.delete_run(owned.run_id),
    ):
        with pytest.raises(Exception, match="Permission denied"):
            touch()
    assert register(own, "dsl-guest").uri == "models:/dsl-guest/1"

    as_user(OWNER)
    assert registry.describe(made.uri, server.uri) == made
    assert history(owned, "loss") == []
    assert register(owned, "dsl-owned").uri == "models:/dsl-owned/2"


def test_the_database_dies_under_a_run_and_comes_back(
    server: DeployedServer, database: Postgres, as_user: As, tmp_path: Path
) -> None:
    """SIGKILL of PostgreSQL three times while metrics are sent; MLflow itself stays up."""
    handle = start(server, tmp_path, "among")
    logger = Logger(Journal(handle.folder), handle, interval=0.01)
    ended, steps = threading.Event(), 0

    def training() -> None:
        nonlocal steps
        while not ended.is_set():
            steps += 1
            logger.log(steps, {"loss": 1 / steps, "grad_norm": steps / 8})
            time.sleep(0.01)

    thread = threading.Thread(target=training)
    thread.start()
    try:
        for _ in range(3):
            sent = logger._sender.offset
            until(lambda sent=sent: logger._sender.offset > sent)
            database.kill()
            seen = steps
            until(lambda seen=seen: steps > seen + 100)  # training goes on meanwhile
            database.up()
    finally:
        ended.set()
        thread.join()
    logger.close(patience=300)
    tracking.finish(handle)
    tracking.replay(handle.folder)
    assert history(handle, "loss") == [(step, 1 / step) for step in range(1, steps + 1)]
    assert history(handle, "grad_norm") == [(step, step / 8) for step in range(1, steps + 1)]
    (found,) = runs(server, "toy", **{"attributes.run_name": "among"})
    assert found.info.status == "FINISHED"


def test_the_database_is_away_when_a_run_starts(
    server: DeployedServer, database: Postgres, as_user: As, tmp_path: Path
) -> None:
    database.kill()
    handle = start(server, tmp_path, "early")
    train(handle, 20)
    database.up()
    handle = tracking.finish(handle)
    tracking.replay(handle.folder)
    assert history(handle, "loss") == [(step, 1 / step) for step in range(1, 21)]
    (found,) = runs(server, "toy", **{"attributes.run_name": "early"})
    assert found.info.status == "FINISHED"
