"""A run on a Ray cluster of its own: what ends its processes from outside."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from tests.faults import nodes, processes
from tests.faults.conftest import Cost

TERMINATED, INFRASTRUCTURE = 143, 4


def test_sigterm_of_the_whole_process_group(
    undisturbed: Path, data: Path, tmp_path: Path, cost: Cost
) -> None:
    """As `timeout` sends it."""
    with processes.finetune(None, data, tmp_path, "train.checkpoint.every=1000") as run:
        run.until(lambda: run.step >= 20)
        when = time.time()
        os.killpg(run.process.pid, signal.SIGTERM)
        assert run.wait() == TERMINATED, run.said
        ended_s = time.time() - when
        step = run.step
    assert run.checkpoints == [step]
    assert json.loads((run.folder / "run.json").read_text())["status"] == "KILLED"
    with processes.finetune(None, data, tmp_path) as again:
        assert again.wait() == 0, again.said
    lost = f"nothing: a last checkpoint, ended {ended_s:.1f} s after it"
    cost("SIGTERM of the whole process group", lost, again.recovered(step + 1, when))
    processes.assert_equal(run.folder, undisturbed)


def test_a_raylet_that_dies(undisturbed: Path, data: Path, tmp_path: Path, cost: Cost) -> None:
    with processes.finetune(None, data, tmp_path) as run:
        run.until(lambda: run.checkpoints)
        when = time.time()
        os.kill(raylet_of(run.process.pid), signal.SIGKILL)
        assert run.wait() == INFRASTRUCTURE, run.said
    assert run.message == (
        "Ray on this machine: its raylet has died. "
        "Out of memory? Run the same command again to resume"
    )
    step = run.step
    with processes.finetune(None, data, tmp_path) as again:
        assert again.wait() == 0, again.said
    lost = f"at most {processes.EVERY} steps, redone; exit 4 names it"
    cost("the raylet of a run's own cluster dies", lost, again.recovered(step + 1, when))
    processes.assert_equal(again.folder, undisturbed)


def raylet_of(driver: int) -> int:
    (found,) = [
        pid
        for pid in nodes.descendants(driver)
        if Path(f"/proc/{pid}/comm").read_text().strip() == "raylet"
    ]
    return found
