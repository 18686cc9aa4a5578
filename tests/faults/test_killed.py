"""SIGKILL of a rank at three moments of one run, and of the driver."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.faults import nodes, processes
from tests.faults.conftest import Report
from tests.faults.processes import EVERY, Begin, Run


def kill_a_rank(run: Run) -> tuple[float, int]:
    """When, and the last step that was done then."""
    os.kill(nodes.workers()[-1], signal.SIGKILL)
    return time.time(), run.step


def test_a_rank(undisturbed: Path, finetune: Begin, tmp_path: Path, report: Report) -> None:
    """Before the first checkpoint, between two, and while one is being written."""
    with finetune(tmp_path, "workers.max_failures=9") as run:
        run.until(lambda: run.step >= EVERY // 4)
        when, step = kill_a_rank(run)
        assert not run.checkpoints
        report(
            "a rank dies before the first checkpoint", injected="SIGKILL",
            lost=f"{step} steps, redone", recovered_s=run.recovered(step, when),
        )  # fmt: skip

        run.until(lambda: run.step >= EVERY + 5 and run.checkpoints)
        when, step = kill_a_rank(run)
        kept = max(run.checkpoints)
        report(
            "a rank dies between checkpoints", injected="SIGKILL",
            lost=f"{step - kept} steps, redone", recovered_s=run.recovered(step, when),
        )  # fmt: skip

        when, step, torn = kill_in_a_write(run)
        kept = max(run.checkpoints)
        assert not (torn / "commit.json").exists()
        report(
            "a rank dies while a checkpoint is written", injected="SIGKILL",
            lost=f"that checkpoint; {step - kept} steps, redone",
            recovered_s=run.recovered(step, when),
        )  # fmt: skip
        assert run.wait() == 0, run.said
    processes.assert_equal(run.folder, undisturbed)


def kill_in_a_write(run: Run) -> tuple[float, int, Path]:
    """Kill as soon as a checkpoint has a file and no commit; where that was late, the next one."""
    folder = run.folder / "checkpoints"
    while True:
        victim = run.until(nodes.workers)[-1]
        known = set(os.listdir(folder))
        while not (new := set(os.listdir(folder)) - known):
            assert run.process.poll() is None, run.said
            time.sleep(0.001)
        os.kill(victim, signal.SIGKILL)
        when, step, torn = time.time(), run.step, folder / max(new)
        if not (torn / "commit.json").exists():
            return when, step, torn
        run.recovered(step, when)


def test_the_driver(undisturbed: Path, finetune: Begin, tmp_path: Path, report: Report) -> None:
    """Its workers go with it, and the same command at once goes on from the last checkpoint."""
    with finetune(tmp_path) as killed:
        killed.until(lambda: killed.step >= EVERY + 5 and killed.checkpoints)
        orphans = nodes.workers()
        assert len(orphans) == 2
        killed.process.kill()
        when, step = time.time(), killed.step
    with finetune(tmp_path) as run:
        processes.until(lambda: not any(map(nodes.alive, orphans)))
        gone_s = time.time() - when
        again = run.recovered(step, when)
        assert run.wait() == 0, run.said
    report(
        "the driver dies", injected="SIGKILL, then the same command at once",
        lost=f"at most {EVERY} steps, redone; its workers live {gone_s:.0f} s longer",
        recovered_s=again,
    )  # fmt: skip
    processes.assert_equal(run.folder, undisturbed)
