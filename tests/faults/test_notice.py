"""What is announced, and what hangs."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import ray
from ray.core.generated import autoscaler_pb2

from tests.faults import processes
from tests.faults.conftest import Cost
from tests.faults.nodes import Nodes, workers
from tests.faults.processes import STEPS, Begin
from tests.pipelines import tiny

SELDOM = "train.checkpoint.every=1000"  # so that only a notice makes a checkpoint before the last
TERMINATED = 143
STALL_S = 20


def test_sigterm_of_the_driver(
    undisturbed: Path, finetune: Begin, tmp_path: Path, cost: Cost
) -> None:
    with finetune(tmp_path, SELDOM) as run:
        run.until(lambda: run.step >= 20)
        when = time.time()
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == TERMINATED, run.said
        ended_s = time.time() - when
        assert run.message == "ended by SIGTERM; run the same command again to resume"
    (kept,) = run.checkpoints
    assert kept == run.step
    assert json.loads((run.folder / "run.json").read_text())["status"] == "KILLED"
    with finetune(tmp_path, SELDOM) as again:
        assert again.wait() == 0, again.said
    cost(
        "SIGTERM with notice",
        f"nothing: a last checkpoint, ended {ended_s:.1f} s after it",
        again.recovered(kept + 1, when),
    )
    processes.assert_equal(run.folder, undisturbed)


def test_a_node_whose_end_is_announced(
    nodes: Nodes, undisturbed: Path, finetune: Begin, tmp_path: Path, cost: Cost
) -> None:
    with finetune(tmp_path, SELDOM, "train.validate_every=1") as run:
        run.until(lambda: run.step >= 20)
        nodes.add()
        victim = workers()[-1]
        drain(nodes, nodes.id_of(victim))
        (kept,) = run.until(lambda: run.checkpoints)
        when = time.time()
        nodes.lose(victim)
        step = run.step
        recovered_s = run.recovered(step + 1, when)
        assert run.wait() == 0, run.said
    cost(
        "a node goes with notice",
        f"{step - kept} steps after the checkpoint at the notice",
        recovered_s,
    )
    assert [row["step"] for row in tiny.curve(run.folder)] == list(range(1, STEPS + 1))


def drain(nodes: Nodes, node: str) -> None:
    """What a raylet does that gets SIGTERM: it announces its end to the head."""
    client = ray._raylet.GcsClient(address=nodes.address)
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    deadline = round(1000 * (time.time() + 300))
    accepted, why = client.drain_node(node, reason, "spot machine", deadline)
    assert accepted, why


def test_a_rank_that_hangs(undisturbed: Path, finetune: Begin, tmp_path: Path, cost: Cost) -> None:
    with finetune(tmp_path, f"workers.parallel.stall_s={STALL_S}") as run:
        run.until(lambda: run.step >= 25 and run.checkpoints)
        victim = workers()[-1]
        kept = max(run.checkpoints)
        os.kill(victim, signal.SIGSTOP)
        when, step = time.time(), run.step
        recovered_s = run.recovered(step, when)
        assert run.wait() == 0, run.said
    logs = "".join(path.read_text() for path in (run.folder / "logs").iterdir())
    assert f"nothing was finished for {STALL_S} s" in logs
    assert "gives no sign of life" in logs or "does not answer" in logs
    cost(f"a rank hangs, stall_s={STALL_S}", f"{step - kept} steps, redone", recovered_s)
    processes.assert_equal(run.folder, undisturbed)
