"""A rank that hangs: the others say which, and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_S = 3

RANK = """
import os, signal, sys
import torch, torch.distributed as dist
from infra import stall
from infra.errors import InfraError

path, rank, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
stall.MARGIN_S = 1.0
try:
    with stall.watched({timeout}, 38) as watch:
        for step in range(39, 10_000):
            watch.doing(f"in step {{step}}")
            if (rank, step) == (1, 41):
                print("hangs", flush=True)
                if how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                watch.doing("waiting for the data of step 41")
                sys.stdin.readline()
            dist.all_reduce(torch.ones(1))
            watch.finished(step)
except InfraError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("how", "state"),
    [
        ("stopped", "gives no sign of life"),
        ("waiting", "last finished step 40, waiting for the data of step 41"),
    ],
)
def test_a_rank_that_hangs_is_named(tmp_path: Path, how: str, state: str) -> None:
    script = RANK.format(timeout=TIMEOUT_S)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "store"), str(rank), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said, _ = ranks[0].communicate(timeout=300)
        assert ranks[0].returncode == 4, said
        assert f"workers: no step was finished for {TIMEOUT_S} s" in said
        assert "rank 0 last finished step 40, in step 41" in said
        assert "rank 1" in said
        assert state in said
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
            rank.wait()


def test_a_loop_that_ends_is_not_disturbed(tmp_path: Path) -> None:
    script = RANK.format(timeout=1000).replace("range(39, 10_000)", "range(50, 60)")
    ranks = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "store"), str(rank), "not"])
        for rank in range(2)
    ]
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    assert os.listdir(tmp_path) in ([], ["store"])
