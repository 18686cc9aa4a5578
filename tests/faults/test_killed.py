"""SIGKILL of a rank at two moments of one run, and of the driver.

For a rank that dies between two checkpoints see `tests/pipelines/test_workers.py`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.faults import nodes, processes
from tests.faults.conftest import Cost
from tests.faults.processes import EVERY, Begin, Run


def test_a_rank(undisturbed: Path, finetune: Begin, tmp_path: Path, cost: Cost) -> None:
    """Before the first checkpoint, and while one is being written."""
    with finetune(tmp_path, "workers.max_failures=9") as run:
        run.until(lambda: run.step >= EVERY // 4)
        os.kill(nodes.workers()[-1], signal.SIGKILL)
        when, step = time.time(), run.step
        assert not run.checkpoints
        again_s = run.recovered(step, when)
        cost("a rank dies before the first checkpoint", f"{step} steps, redone", again_s)

        run.until(lambda: run.checkpoints)
        when, step, torn = kill_in_a_write(run)
        lost = f"that checkpoint; {step - max(run.checkpoints)} steps, redone"
        assert not (torn / "commit.json").exists()
        cost("a rank dies while a checkpoint is written", lost, run.recovered(step, when))
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


def test_the_driver(undisturbed: Path, finetune: Begin, tmp_path: Path, cost: Cost) -> None:
    """Its workers go with it, and the same command at once goes on from the last checkpoint."""
    with finetune(tmp_path) as killed:
        killed.until(lambda: killed.step >= EVERY + 5 and killed.checkpoints)
        orphans = nodes.workers()
        assert len(orphans) == 2
        killed.process.kill()
        when, step = time.time(), killed.step
    with finetune(tmp_path) as run:
        processes.until(lambda: not any(map(nodes.alive, orphans)), processes.PATIENCE_S)
        gone_s = time.time() - when
        again = run.recovered(step, when)
        assert run.wait() == 0, run.said
    cost(
        "the driver dies",
        f"at most {EVERY} steps, redone; its workers live {gone_s:.0f} s longer",
        again,
    )
    processes.assert_equal(run.folder, undisturbed)
