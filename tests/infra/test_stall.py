"""A rank that hangs: the others say which, and end."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from infra import stall
from infra.errors import DataError
from tests.infra.common import free_port, until

TIMEOUT_S = 8  # long for a step of these, even where the machine is busy

RANK = """
import os, signal, sys
import torch, torch.distributed as dist
from infra import stall
from infra.errors import InfraError

port, rank, how, victim = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
stall.MARGIN_S = 2.0
SIGNALS = {{"stopped": signal.SIGSTOP, "killed": signal.SIGKILL}}
try:
    with stall.detected({timeout}, 38) as this:
        for step in range(39, 10_000):
            this.doing(f"in step {{step}}")
            if (rank, step) == (victim, 41):
                print("hangs", flush=True)
                if how in SIGNALS:
                    os.kill(os.getpid(), SIGNALS[how])
                this.doing("waiting for the data of step 41")
                sys.stdin.readline()
            dist.all_reduce(torch.ones(1))
            this.finished(step)
except InfraError as error:
    print(type(error).__name__, error, flush=True)
    os._exit(error.exit_code)  # its collective has failed, and gloo may abort a tidy end
dist.destroy_process_group()  # else its threads may abort a process that ends
"""


def ranks(script: str, how: str, victim: int) -> list[subprocess.Popen[str]]:
    """Two processes of one group, of which one may be made to hang."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, str(port), str(rank), how, str(victim)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]


Case = tuple[str, int]  # how, and which rank
CASES: dict[Case, list[str]] = {
    ("stopped", 1): ["rank 1 last finished step", ", gives no sign of life"],
    ("stopped", 0): ["rank 0 does not answer for all"],
    ("waiting", 1): ["rank 1 last finished step 40, waiting for the data of step 41"],
}


@pytest.fixture(scope="module")
def ended() -> Iterator[dict[Case, tuple[int, str]]]:
    """The exit code of the other rank of each case and what it said, all after one wait."""
    groups = {case: ranks(RANK.format(timeout=TIMEOUT_S), *case) for case in CASES}
    try:
        others = {case: group[1 - case[1]] for case, group in groups.items()}
        said = {case: other.communicate(timeout=300)[0] for case, other in others.items()}
        yield {case: (others[case].returncode, said[case]) for case in CASES}
    finally:
        for rank in itertools.chain(*groups.values()):
            rank.send_signal(signal.SIGKILL)
            rank.wait()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_rank_that_hangs_is_named(ended: dict[Case, tuple[int, str]], case: Case) -> None:
    code, said = ended[case]
    assert code == 4, said
    assert f"workers: nothing was finished for {TIMEOUT_S} s" in said
    assert f"rank {1 - case[1]} last finished step 40, in step 41" in said
    assert [words for words in CASES[case] if words not in said] == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_is_no_bug_of_the_other(victim: int) -> None:
    group = ranks(RANK.format(timeout=1000), "killed", victim)
    said, _ = group[1 - victim].communicate(timeout=300)
    assert said == (
        "PeerLost workers: the connection to another worker broke. The same command resumes\n"
    )
    assert (group[1 - victim].returncode, group[victim].wait(300)) == (4, -signal.SIGKILL)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_what_a_rank_does_has_the_whole_time_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two things in one step, which together take longer than one may."""
    now, read = 0.0, 0

    def clock() -> float:
        nonlocal read
        read += 1
        return now

    def pass_s(seconds: float) -> None:
        """Returns once the thread that keeps the time has read it some times."""
        nonlocal now, read
        now, read = now + seconds, 0
        until(lambda: read > 20)

    monkeypatch.setattr(stall, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    monkeypatch.setattr(stall, "BEAT_S", 0.01)
    with stall.detected(10, 38) as rank:
        for what in ("one thing", "another"):
            rank.doing(what)
            pass_s(9)
            assert rank.report is None
        now += 2
        told = until(lambda: rank.report)
    assert told == "nothing was finished for 10 s: rank 0 last finished step 38, another"


def test_a_loop_that_ends_is_not_disturbed() -> None:
    script = RANK.format(timeout=1000).replace("range(39, 10_000)", "range(50, 60)")
    assert [rank.wait(300) for rank in ranks(script, "not", 1)] == [0, 0]


@pytest.mark.usefixtures("group")
def test_a_rank_that_went_on_while_all_were_asked_is_not_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it raises later is another error, told as what it is."""
    asked, went_on = threading.Event(), threading.Event()

    def ask(rank: stall.Rank) -> str:
        asked.set()
        went_on.wait(300)
        return "nothing was finished"

    def go_on(rank: stall.Rank) -> None:
        assert asked.wait(300)
        rank.finished(1)
        went_on.set()
        raise DataError("part-00000.parquet", "damaged")

    monkeypatch.setattr(stall.Rank, "_ask", ask)
    with pytest.raises(DataError), stall.detected(0.1, 0) as rank:
        go_on(rank)
