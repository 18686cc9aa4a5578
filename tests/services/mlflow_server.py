"""MLflow as `infra/deploy/mlflow` configures it, on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.infra.common import MLflowServer
from tests.infra.manifests import DEPLOY, documents
from tests.services.debian import Postgres

ADMIN = ("admin", "password-of-admin")
DATABASE_USER = "mlflow"
DATABASE_PASSWORD = "password-of-the-database"


class DeployedServer(MLflowServer):
    """The server of `server.yaml` with the users of `basic_auth.ini`.

    Options, environment and settings are those of the files. Replaced are only the addresses, the
    ports and the place of the artifacts.
    """

    def __init__(self, folder: Path, database: Postgres) -> None:
        super().__init__(folder, "")
        self.database = database
        self.uri = f"http://localhost:{self.port}"
        replaced = {
            "mlflow-database:5432": f"127.0.0.1:{database.port}",
            "0.0.0.0": "127.0.0.1",
            "5000": str(self.port),
            "s3://bucket/mlflow": str(folder / "artifacts"),
        }

        def here(text: str) -> str:
            for deployed, local in replaced.items():
                text = text.replace(deployed, local)
            return text

        deployment = documents(DEPLOY / "mlflow/server.yaml")[0]
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        self.command = [sys.executable, "-m", *map(here, container["args"])]
        users = folder / "basic_auth.ini"
        users.write_text(here((DEPLOY / "mlflow/basic_auth.ini").read_text()))
        given = {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_AUTH_CONFIG_PATH": str(users),
            "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "key-of-the-sessions",
            "PGPASSWORD": DATABASE_PASSWORD,
        }
        assert given.keys() == {variable["name"] for variable in container["env"]}
        self.environment = os.environ | given

    def add_user(self, name: str, password: str) -> None:
        """As infra/README.md describes it."""
        answer = requests.post(
            f"{self.uri}/api/2.0/mlflow/users/create",
            json={"username": name, "password": password}, auth=ADMIN, timeout=300,
        )  # fmt: skip
        answer.raise_for_status()


@contextmanager
def deployed(folder: Path) -> Iterator[DeployedServer]:
    """Such a server, up, on a database of its own."""
    for module in ("psycopg2", "flask_wtf"):
        pytest.importorskip(module, reason="`pip install -e '.[services]'` brings it")
    database = Postgres(DATABASE_USER, DATABASE_PASSWORD)
    try:
        database.up()
        database.sql("create database mlflow")  # as POSTGRES_DB has the image do
        server = DeployedServer(folder, database)
        try:
            server.up()
            yield server
        finally:
            server.down()
    finally:
        database.remove()
