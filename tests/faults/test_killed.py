"""SIGKILL of a rank at three moments of one run, and of the driver."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.faults import processes
from tests.faults.conftest import Report
from tests.faults.processes import EVERY, Run


def kill_a_rank(run: Run) -> tuple[float, int]:
    """When, and the last step that was done then."""
    victim = run.workers()[-1]
    os.kill(victim, signal.SIGKILL)
    return time.time(), run.step


def test_a_rank(undisturbed: Path, data: Path, tmp_path: Path, report: Report) -> None:
    """Before the first checkpoint, between two, and while one is being written."""
    with processes.finetune(data, tmp_path, "workers.max_failures=9") as run:
        run.until(lambda: run.step >= EVERY // 2)
        when, step = kill_a_rank(run)
        assert not run.checkpoints
        report(
            "rank dies before the first checkpoint", injected="SIGKILL",
            lost=f"{step} steps, redone", recovered_s=run.recovered(step, when),
        )  # fmt: skip

        run.until(lambda: run.step >= EVERY + 10)
        when, step = kill_a_rank(run)
        kept = max(run.checkpoints)
        report(
            "rank dies between checkpoints", injected="SIGKILL",
            lost=f"{step - kept} steps, redone", recovered_s=run.recovered(step, when),
        )  # fmt: skip

        when, step, torn = kill_in_a_write(run)
        assert not (torn / "commit.json").exists()
        kept = max(run.checkpoints)
        report(
            "rank dies while a checkpoint is written", injected="SIGKILL",
            lost=f"that checkpoint; {step - kept} steps, redone",
            recovered_s=run.recovered(step, when),
        )  # fmt: skip
        assert run.wait() == 0, run.said
    processes.assert_equal(run.folder, undisturbed)


def kill_in_a_write(run: Run) -> tuple[float, int, Path]:
    """Kill as soon as a checkpoint has a file and no commit; where that was late, the next one."""
    while True:
        victim = run.until(run.workers)[-1]
        known = set((run.folder / "checkpoints").iterdir())
        folder = run.folder / "checkpoints"
        while not (new := set(folder.iterdir()) - known):
            assert run.process.poll() is None, run.said
        os.kill(victim, signal.SIGKILL)
        when, step = time.time(), run.step
        (torn,) = new
        if not (torn / "commit.json").exists():
            return when, step, torn
        run.recovered(step, when)


def test_the_driver(undisturbed: Path, data: Path, tmp_path: Path, report: Report) -> None:
    """Its Ray and its workers go with it; the same command goes on from the last checkpoint."""
    with processes.finetune(data, tmp_path) as killed:
        killed.until(lambda: killed.step >= EVERY + 10)
        assert len(killed.workers()) == 2
        killed.process.kill()
        when, kept = time.time(), max(killed.checkpoints)
        processes.until(lambda: not any(map(processes.alive, killed.family)))
        gone_s, step = time.time() - when, killed.step
    with processes.finetune(data, tmp_path) as run:
        again = run.recovered(step, time.time())
        assert run.wait() == 0, run.said
    report(
        "driver dies", injected="SIGKILL, then the same command",
        lost=f"{step - kept} steps, redone; no process outlives it by {gone_s:.0f} s",
        recovered_s=again,
    )  # fmt: skip
    processes.assert_equal(run.folder, undisturbed)
