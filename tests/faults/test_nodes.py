"""Nodes that are lost, and come back."""

from __future__ import annotations

import time
from pathlib import Path

from tests.faults import processes
from tests.faults.conftest import Cost
from tests.faults.nodes import Nodes, workers
from tests.faults.processes import EVERY, Begin


def test_a_node_with_another_to_take_its_place(
    nodes: Nodes, undisturbed: Path, finetune: Begin, tmp_path: Path, cost: Cost
) -> None:
    with finetune(tmp_path) as run:
        run.until(lambda: run.step >= EVERY + 5 and run.checkpoints)
        nodes.add()
        nodes.lose(workers()[-1])
        when, step, kept = time.time(), run.step, max(run.checkpoints)
        cost(
            "a node dies, another has room",
            f"{step - kept} steps, redone",
            run.recovered(max(step, kept + 1), when),  # where none was lost, the next one
        )
        assert run.wait() == 0, run.said
    processes.assert_equal(run.folder, undisturbed)


def test_a_node_that_comes_back(
    nodes: Nodes, undisturbed: Path, finetune: Begin, tmp_path: Path, cost: Cost
) -> None:
    """Two workers, one, two again: the same data and noise all along, so the same weights."""
    settings = [
        "workers.count=[1, 2]", "workers.resize_s=10", "train.checkpoint.every=5",
        # Which take their time, so that the run is not over when the node is back.
        "train.validate_every=1", "train.validation_microbatches=8",
    ]  # fmt: skip
    with finetune(tmp_path, *settings) as run:
        run.until(lambda: run.step >= EVERY and run.checkpoints)
        both = set(workers())
        assert len(both) == 2
        nodes.lose(workers()[-1])
        when, step, kept = time.time(), run.step, max(run.checkpoints)
        # The one that is left may yet finish the step it was in: only a new one has recovered.
        run.until(lambda: len(workers()) == 1 and not both & set(workers()))
        alone_s = run.recovered(run.step + 1, when)
        nodes.add()
        back, before = time.time(), set(workers())
        run.until(lambda: len(workers()) == 2 and not before & set(workers()))
        together_s = run.recovered(run.step + 1, back)
        assert run.wait() == 0, run.said
    cost(
        "a node dies, none has room: [1, 2] workers go on as one",
        f"{step - kept} steps, redone",
        alone_s,
    )
    cost(
        "the node comes back: one worker becomes two",
        "the steps since the last checkpoint, redone",
        together_s,
    )
    processes.assert_close(run.folder, undisturbed)
