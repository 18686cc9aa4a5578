"""One writer at a time: leases among real processes, on a disk and in an object store."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import lease
from infra.errors import InfraError
from infra.lease import held
from infra.storage import Folder
from tests.infra.common import until
from tests.infra.faulty import BUCKET, FaultyStore

HOLD = """
import sys, time
from infra.lease import held
from infra.storage import Folder
with held(Folder.at(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""
NO_ROOM = """
import resource, sys
from infra.lease import held
from infra.storage import Folder
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
with held(Folder.at(sys.argv[1])):
    pass
"""


@pytest.fixture(scope="module")
def _bucket() -> Iterator[None]:
    """Of a store that heeds no conditions: every write succeeds, and the last one wins."""
    with FaultyStore():
        yield


@pytest.fixture(params=["disk", "memory", "bucket"])
def run(request: pytest.FixtureRequest, _bucket: None, tmp_path: Path) -> Iterator[Folder]:
    roots = {"disk": str(tmp_path), "memory": "memory://leases", "bucket": f"s3://{BUCKET}/leases"}
    folder = Folder.at(roots[request.param])
    yield folder / "run"
    folder.remove()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.0)
    monkeypatch.setattr(lease, "LOOK_S", 0.02)
    monkeypatch.setattr(lease, "PATIENCE_S", 0.5)
    monkeypatch.setattr(lease, "BEAT_S", 0.05)


def other(run: Folder, **content: Any) -> None:
    """Leave the lease of a process elsewhere."""
    whole = {
        "holder": "x", "host": "elsewhere", "machine": "other", "pid": 7, "started": "1",
        "job": None, "since": "2026-01-01T00:00:00+00:00", "beat": 0, **content,
    }  # fmt: skip
    lease._folder(run).write_bytes("000004.json", json.dumps(whole).encode())


def holder(run: Folder) -> subprocess.Popen[str]:
    """Another process that holds a run until it is told a line."""
    command = [sys.executable, "-c", HOLD, run.url]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lease_leaves_nothing(run: Folder) -> None:
    parent = Folder(run.filesystem, run.path.rpartition("/")[0])
    with held(run) as mine:
        mine.confirm()
        assert parent.names() == [".run.lease"]
        with (
            pytest.raises(InfraError, match=f"is being written by process {os.getpid()} on"),
            held(run),
        ):
            pass
        mine.confirm()
    assert parent.names() == []
    with held(run):
        pass


def test_a_lease_that_finds_no_room_leaves_no_empty_one(tmp_path: Path) -> None:
    """Where no file may hold a byte, in a process of its own."""
    run = Folder.at(str(tmp_path / "run"))
    ended = subprocess.run(
        [sys.executable, "-c", NO_ROOM, run.url], capture_output=True, text=True, check=False
    )
    assert ended.stderr.splitlines()[-1].startswith("infra.errors.InfraError: "), ended.stderr
    assert lease._folder(run).names() == []


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    run = Folder.at(str(tmp_path / "run"))
    first = holder(run)
    with pytest.raises(InfraError) as refused, held(run):
        pass
    assert f"process {first.pid} on " in str(refused.value)
    assert "Wait for it, stop it, or choose another name" in str(refused.value)
    first.communicate("\n", timeout=300)
    with held(run):
        pass


def test_a_killed_holder_is_followed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "PATIENCE_S", 1e9)  # which is not waited for
    run = Folder.at(str(tmp_path / "run"))
    first = holder(run)
    first.send_signal(signal.SIGKILL)
    state = Path(f"/proc/{first.pid}/stat")
    until(lambda: state.read_text().rpartition(")")[2].startswith(" Z"))  # nobody has waited for it
    with held(run) as mine:
        assert mine.number == 2
        assert lease._folder(run).names() == ["000002.json"]
    first.wait()


@pytest.mark.parametrize("hours", [-1, 0, 1])
def test_a_still_lease_of_another_machine_is_taken_over_whatever_its_clock_says(
    run: Folder, hours: int
) -> None:
    now = time.time() + 3600 * hours
    other(run, since=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(now)))
    began = time.monotonic()
    with held(run) as mine:
        assert mine.number == 5
        assert time.monotonic() - began >= lease.PATIENCE_S


def test_a_lease_of_another_machine_that_beats_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "PATIENCE_S", 60.0)
    run = Folder.at(str(tmp_path / "run"))
    with held(run) as mine:
        monkeypatch.setattr(lease, "_machine", lambda: "another")
        with pytest.raises(InfraError, match="is being written by"), held(run):
            pass
        mine.confirm()


def test_a_holder_that_was_passed_over_writes_no_more(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 1e9)  # as where it stands still
    with held(run) as mine:
        other(run)
        for known in (mine, pickle.loads(pickle.dumps(mine))):
            with pytest.raises(InfraError, match="taken over by process 7 on elsewhere"):
                known.confirm()
    assert lease._folder(run).names() == ["000004.json"]


def test_a_holder_that_was_passed_over_beats_no_more(run: Folder) -> None:
    """Or its lease, which the other one has removed, would stand in the way of the next."""
    with held(run) as mine:
        other(run)
        until(lambda: "lease" not in {thread.name for thread in threading.enumerate()})
        lease._folder(run).remove(mine.name)
    assert lease._folder(run).names() == ["000004.json"]


def test_a_stopped_holder_wakes_up_and_finds_its_run_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Folder.at(str(tmp_path / "run"))
    with held(run) as first:
        monkeypatch.setattr(lease, "_machine", lambda: "another")
        monkeypatch.setattr(first.folder.__class__, "write_bytes", _refuse)
        with held(run) as second:
            with pytest.raises(InfraError, match="was taken over by process"):
                first.confirm()
            second.confirm()


def _refuse(folder: Folder, name: str, content: bytes) -> None:
    raise InfraError(folder.url, "stands still")


def test_a_store_that_does_not_answer_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(Folder.at(str(tmp_path / "run"))) as mine:
        monkeypatch.setattr(Folder, "names", lambda folder: _refuse(folder, "", b""))
        mine.confirm()


def test_a_process_number_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    run = Folder.at(str(tmp_path / "run"))
    other(run, machine=lease._machine(), pid=os.getpid(), started="1")
    with held(run):
        pass


def test_a_store_whose_list_lags_behind(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lists do not show the lease that was just written."""
    names, asked = lease._names, []

    def late(folder: Folder) -> list[str]:
        asked.append(folder)
        return [] if len(asked) < 3 else names(folder)

    monkeypatch.setattr(lease, "_names", late)
    with held(run):
        assert len(asked) > 2


def test_a_holder_that_is_gone_when_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the write that found its lease there and the look at whose that is."""
    create, tried = lease._create_local, []

    def taken(path: Path, content: bytes) -> None:
        tried.append(path)
        if len(tried) == 1:
            raise FileExistsError(path)
        create(path, content)

    monkeypatch.setattr(lease, "_create_local", taken)
    with held(Folder.at(str(tmp_path / "run"))):
        assert len(tried) == 2


def race(url: str, start: Any, won: Any, rounds: int) -> None:
    for number in range(rounds):
        start.wait()
        try:
            with held(Folder.at(url) / f"run-{number}"):
                won[number] += 1
                start.wait()
        except InfraError:
            start.wait()


def test_of_two_that_race_exactly_one_wins(tmp_path: Path) -> None:
    rounds, context = 100, multiprocessing.get_context("fork")
    won, start = context.Array("i", rounds), context.Barrier(2)
    racers = [
        context.Process(target=race, args=(str(tmp_path), start, won, rounds)) for _ in range(2)
    ]
    for number in range(0, rounds, 2):  # every other one is a race to follow a dead process
        other(Folder.at(str(tmp_path)) / f"run-{number}", machine=lease._machine(), pid=os.getpid())
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(300)
    assert [racer.exitcode for racer in racers] == [0, 0]
    assert list(won) == [1] * rounds
    assert list(tmp_path.iterdir()) == []
