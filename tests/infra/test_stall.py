"""A rank that hangs: the others say which, and end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest

TIMEOUT_S = 3

RANK = """
import os, signal, sys
import torch, torch.distributed as dist
from infra import stall
from infra.errors import InfraError

port, rank, how, victim = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
stall.MARGIN_S = 2.0
try:
    with stall.detected({timeout}, 38) as this:
        for step in range(39, 10_000):
            this.doing(f"in step {{step}}")
            if (rank, step) == (victim, 41):
                print("hangs", flush=True)
                if how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                this.doing("waiting for the data of step 41")
                sys.stdin.readline()
            dist.all_reduce(torch.ones(1))
            this.finished(step)
except InfraError as error:
    print(error, flush=True)
    os._exit(error.exit_code)  # its collective has failed, and gloo may abort a tidy end
dist.destroy_process_group()  # else its threads may abort a process that ends
"""


def ranks(script: str, how: str, victim: int) -> list[subprocess.Popen[str]]:
    """Two processes of one group, of which one may be made to hang."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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


@pytest.mark.parametrize(
    ("how", "victim", "told"),
    [
        ("stopped", 1, ["rank 1 last finished step", ", gives no sign of life"]),
        ("stopped", 0, ["rank 0 does not answer for all"]),
        ("waiting", 1, ["rank 1 last finished step 40, waiting for the data of step 41"]),
    ],
)
def test_a_rank_that_hangs_is_named(how: str, victim: int, told: list[str]) -> None:
    group = ranks(RANK.format(timeout=TIMEOUT_S), how, victim)
    other = group[1 - victim]
    try:
        said, _ = other.communicate(timeout=300)
        assert other.returncode == 4, said
        assert f"workers: no step was finished for {TIMEOUT_S} s" in said
        assert f"rank {1 - victim} last finished step 40, in step 41" in said
        assert [words for words in told if words not in said] == []
    finally:
        for rank in group:
            rank.send_signal(signal.SIGKILL)
            rank.wait()


def test_a_loop_that_ends_is_not_disturbed() -> None:
    script = RANK.format(timeout=1000).replace("range(39, 10_000)", "range(50, 60)")
    assert [rank.wait(300) for rank in ranks(script, "not", 1)] == [0, 0]
