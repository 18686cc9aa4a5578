"""What several tests need: a port, some patience, an MLflow server, rows, a trap for unpickling."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from infra.mixture import Mixture, MixtureConfig
from infra.shards import Manifest, check_files, read_group
from infra.storage import Folder
from infra.stream import Plan


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition: Callable[[], Any], seconds: float = 300.0, *, every_s: float = 0.02) -> Any:
    """What the condition holds, once it holds something; asked again every so many seconds."""
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit, f"not within {seconds:.0f} s"
        time.sleep(every_s)
    return found


class MLflowServer:
    """`mlflow server` on a port of its own, as often started and killed as a test likes."""

    def __init__(self, folder: Path, database: str) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        self.command += ["--port", str(self.port), "--workers", "1"]
        self.command += ["--backend-store-uri", database]
        self.command += ["--artifacts-destination", str(folder / "server-artifacts")]
        self.environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it answers some time later."""
        with (self.folder / "server.log").open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env=self.environment,
                start_new_session=True,
            )

    def up(self) -> None:
        """Returns once it answers."""
        self.start()
        until(self._healthy, 600)

    def down(self) -> None:
        """SIGKILL for it and the processes it serves with, which are one group."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _healthy(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except OSError:
            return False


def alone(plan: Plan) -> Mixture:
    """The microbatches of one source, whose rows are planned."""
    config = MixtureConfig.alone(plan.folder.url)
    return Mixture(config=config, seed=plan.config.seed, plans=(plan,))


def rows_of(folder: Folder, manifest: Manifest, split: str) -> np.ndarray:
    """The rows of a split as they stand in its shards [N, L]."""
    groups = zip(manifest.files(split), check_files(folder, manifest, split), strict=True)
    return np.concatenate(
        [
            read_group(folder, manifest, file.name, index)
            for file, rows in groups
            for index in range(len(rows))
        ]
    )


class Bomb:
    """Makes a folder on being unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)
