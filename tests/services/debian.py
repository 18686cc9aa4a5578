"""Programs that Debian packages bring and pip does not; `make test-services` installs them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from glob import glob
from pathlib import Path

import pytest

from tests.infra.common import free_port, until

# Debian keeps the programs of each PostgreSQL version in a folder that is not on the PATH.
POSTGRES = os.pathsep.join(sorted(glob("/usr/lib/postgresql/*/bin"), reverse=True))
PATH = os.pathsep.join([os.environ["PATH"], POSTGRES])
START_S = 300.0


def program(name: str, package: str) -> str:
    """The path of a program; skips the test where its package is missing."""
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"no {name}: `apt-get install {package}` as root brings it")
    return found


class Postgres:
    """A PostgreSQL server with a database cluster of its own on a free port of 127.0.0.1.

    It is started and killed as often as a test likes. The system's own server is not touched.
    """

    def __init__(self, user: str, password: str) -> None:
        self.port = free_port()
        self.server = program("postgres", "postgresql")
        # PostgreSQL refuses to run as root. The account comes with the package.
        self.account = "postgres" if os.getuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        secret = self.folder / "password"
        secret.write_text(password)
        if self.account:
            for path in (self.folder, secret):
                shutil.chown(path, self.account)
        # As the image of infra/deploy has it: a superuser who needs a password from everywhere.
        subprocess.run(
            [program("initdb", "postgresql"), "--pgdata", self.folder / "data",
             "--username", user, "--pwfile", secret, "--auth", "scram-sha-256"],
            check=True, stdout=subprocess.DEVNULL, user=self.account, cwd=self.folder,
        )  # fmt: skip
        self.execute = [
            program("psql", "postgresql"), "--host=127.0.0.1", f"--port={self.port}",
            f"--username={user}", "--no-password", "--tuples-only", "--no-align", "--command",
        ]  # fmt: skip
        self.environment = os.environ | {"PGPASSWORD": password}
        self.process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        """Returns once it answers."""
        until(self._started, START_S)

    def kill(self) -> None:
        """SIGKILL for the server; the processes that serve its connections end by themselves."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def sql(self, statement: str, database: str = "postgres") -> str:
        """What a statement answers, as text."""
        done = subprocess.run(
            [*self.execute, statement, database],
            env=self.environment, capture_output=True, text=True, check=True, timeout=START_S,
        )  # fmt: skip
        return done.stdout.strip()

    def remove(self) -> None:
        """End the server and delete its data."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
            self.process.wait(START_S)
        shutil.rmtree(self.folder)

    def _started(self) -> bool:
        # The server refuses to start while processes of a killed one still end.
        if self.process is None or self.process.poll() is not None:
            with (self.folder / "postgres.log").open("ab") as output:
                self.process = subprocess.Popen(
                    [self.server, "-D", self.folder / "data", "-h", "127.0.0.1",
                     "-p", str(self.port), "-k", ""],
                    user=self.account, cwd=self.folder, stdout=output, stderr=output,
                    env=self.environment,
                )  # fmt: skip
        answer = subprocess.run(
            [*self.execute, "select 1", "postgres"], env=self.environment, capture_output=True
        )
        return answer.returncode == 0
