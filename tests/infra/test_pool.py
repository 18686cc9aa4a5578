"""Jobs in this process, and in processes that die, raise and are interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from infra import cluster, pool
from infra.errors import DataError, InfraError
from infra.pool import PoolConfig
from tests.infra.common import until

HERE, TWO = PoolConfig(count=0), PoolConfig(count=2)
PATIENCE_S = 60.0


class Job(NamedTuple):
    """What Arrow would not bring back as it was."""

    name: str
    parts: tuple[Any, ...] = ()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_without_processes_jobs_are_done_one_by_one() -> None:
    made: list[str] = []

    def make() -> Callable[[int], int]:
        made.append("made")
        return lambda job: made.append(f"did {job}") or 2 * job

    results = pool.run([1, 2, 3], make, HERE)
    assert made == []
    assert [next(results), next(results)] == [2, 4]
    assert made == ["made", "did 1", "did 2"]
    assert list(results) == [6]


def test_without_processes_ray_is_not_imported() -> None:
    code = (
        "import sys; from infra import pool; config = pool.PoolConfig(count=0)\n"
        "with pool.connected(config): assert list(pool.run([1], lambda: str, config)) == ['1']\n"
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_no_jobs_need_no_processes() -> None:
    assert list(pool.run([], lambda: str, TWO)) == []
    assert list(pool.run([], lambda: 1 / 0, HERE)) == []  # nor a model


@pytest.mark.parametrize("wrong", [{"count": -1}, {"threads": 0}])
def test_a_config_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PoolConfig(**wrong)


@pytest.mark.parametrize(("gpu", "seen"), [(True, "0,1"), (False, "")])
def test_only_a_process_that_reserved_a_gpu_sees_any(
    gpu: bool, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # what Ray leaves
    pool._Worker(lambda: str, PoolConfig(threads=1, gpu=gpu))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.usefixtures("ray_cluster")
def test_every_job_is_done_once_and_told_at_once(tmp_path: Path) -> None:
    """Though one process is killed, and while the first job waits for the others' results."""
    told, killed = tmp_path / "told", tmp_path / "killed"

    def make() -> Callable[[Job], tuple[Job, int, int]]:
        (tmp_path / f"made-by-{os.getpid()}").touch(exist_ok=False)  # no process makes twice

        def work(job: Job) -> tuple[Job, int, int]:
            import torch

            if job.name == "first":
                until(told.exists)
            if job.name == "deadly" and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return job, os.getpid(), torch.get_num_threads()

        return work

    jobs = [
        Job("first"),
        Job("plain", ((), [1, (2, None)], {3: b"4"})),
        Job("deadly"),
        *(Job("many", (nth, np.float64(nth))) for nth in range(5)),
    ]
    results = pool.run(jobs, make, PoolConfig(count=2, threads=1))
    before = [next(results) for _ in jobs[1:]]
    assert "first" not in {job.name for job, *_ in before}
    told.touch()
    after = list(results)
    assert [job.name for job, *_ in after] == ["first"]
    done = [job for job, *_ in before + after]
    assert Counter(map(repr, done)) == Counter(map(repr, jobs))
    assert killed.exists()
    pids = {pid for _, pid, _ in before + after}
    assert os.getpid() not in pids
    assert len(pids) in (2, 3)  # the killed one may have been quick at others before
    assert {threads for *_, threads in before + after} == {1}


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_job_raises_is_raised_here() -> None:
    def make() -> Callable[[int], int]:
        def work(job: int) -> int:
            if job == 3:
                raise DataError("row 3", "is bad", "Mend it")
            return job

        return work

    with pytest.raises(DataError) as caught:
        list(pool.run([1, 2, 3, 4], make, TWO))
    assert str(caught.value) == "row 3: is bad. Mend it"
    assert caught.value.exit_code == 3
    assert type(caught.value) is DataError
    (note,) = caught.value.__notes__
    assert "in work" in note


@pytest.mark.usefixtures("ray_cluster")
def test_what_making_raises_is_raised_here() -> None:
    def make() -> Callable[[int], int]:
        raise KeyError("no such model")

    with pytest.raises(KeyError, match="no such model"):
        list(pool.run([1], make, TWO))


class Stubborn(Exception):
    """As those of some libraries: it cannot be made again from what it says."""

    def __init__(self, *, response: str) -> None:
        super().__init__(f"answered {response}")


def test_an_error_that_cannot_travel_says_the_same() -> None:
    error = pool._portable(Stubborn(response="404"))
    assert (type(error), str(error)) == (RuntimeError, "Stubborn: answered 404")
    assert type(pool._portable(ValueError("v"))) is ValueError


@pytest.mark.usefixtures("ray_cluster")
def test_a_job_that_kills_every_process_is_given_up(tmp_path: Path) -> None:
    attempts = tmp_path / "attempts"

    def make() -> Callable[[int], int]:
        def work(job: int) -> int:
            with attempts.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
            return job

        return work

    with pytest.raises(InfraError, match=r"job 0: the process died at each of 4 attempts"):
        list(pool.run([7], make, PoolConfig(count=1)))
    assert attempts.read_text() == "x" * pool.ATTEMPTS


@pytest.mark.usefixtures("ray_cluster")
def test_an_interrupt_leaves_no_process_behind(tmp_path: Path) -> None:
    def make() -> Callable[[int], int]:
        def work(job: int) -> int:
            (tmp_path / str(os.getpid())).touch()
            if job:
                time.sleep(10 * PATIENCE_S)
            return job

        return work

    def interrupt() -> None:
        until(lambda: len(list(tmp_path.iterdir())) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    def consume(results: Iterator[int]) -> None:
        threading.Thread(target=interrupt, daemon=True).start()
        list(results)

    # A shell that runs its tests in the background has them ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            consume(pool.run([0, 1, 1], make, TWO))
    finally:
        signal.signal(signal.SIGINT, before)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    until(lambda: not any(map(alive, pids)))


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "START_S", 1)
    with pytest.raises(InfraError, match="no room for 1 processes of 1 CPUs and a GPU"):
        list(pool.run([1], lambda: str, PoolConfig(count=1, gpu=True)))
