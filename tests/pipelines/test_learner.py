"""One optimizer step as a GPU would see it: its waits, its graphs, and its precision.

Shapes: R rows of a microbatch, L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dsl.dit
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiTConfig, rotary
from dsl.objective import DSLObjective
from dsl.support import Mixed
from infra import parallel
from infra.mixture import ALONE
from infra.parallel import ParallelConfig
from pipelines.training.learner import Learner
from pipelines.training.settings import OptimizerConfig, TrainConfig
from tests.gpu import GPU, standing_in

R, L, TOKENS = 4, 12, 17
BLOCKS = 9  # one more than the graphs that torch.compile makes of one function before it gives up
rows_RL = np.random.default_rng(0).integers(TOKENS, size=(R, L))


def objective(blocks: int = 2) -> DSLObjective:
    torch.manual_seed(0)
    backbone = DiTConfig(tokens=TOKENS, width=16, blocks=blocks, heads=2, cond_dim=8, start="open")
    return DSLObjective(Denoiser(DenoiserConfig(backbone=backbone, embed_dim=4)), Mixed())


def test_a_step_waits_for_its_metrics_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "device", lambda: GPU)
    adamw = torch.optim.AdamW

    def foreach(*args: Any, fused: bool, **kwargs: Any) -> torch.optim.AdamW:
        return adamw(*args, foreach=fused, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", foreach)  # there is no fused one for a stand-in
    mesh = SimpleNamespace(size=lambda: 1, device_type="cpu")
    with standing_in() as waits:
        learner = Learner(objective(), TrainConfig(), mesh, ParallelConfig())
        learner.step(1, {0: rows_RL, 1: rows_RL})
        waits.found.clear()
        metrics = learner.step(2, {0: rows_RL, 1: rows_RL})
        assert metrics["loss"] > 0
        assert [line.partition(":")[0] for _, line in waits.found] == ["infra/parallel.py"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_and_validation_are_one_graph_each(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all blocks together, none of them broken, and none made anew in later steps."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compile_block = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block: compile_block(block, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = ParallelConfig(compile=True, activation_checkpointing=checkpointing)
    with parallel.join(config) as mesh:
        learner = Learner(objective(BLOCKS), TrainConfig(), mesh, config)
        made = []
        for step in (1, 2):
            learner.step(step, {0: rows_RL, 1: rows_RL})
            made.append(len(graphs))
            learner.validate({ALONE: [(0, rows_RL)]}, {ALONE: 1.0}, {})
            made.append(len(graphs))
    assert made == [1, 2, 2, 2]
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_rows_of_a_validation_have_noise_of_their_own() -> None:
    """A bound is told how many rows came before those of the numbered microbatch."""
    told: list[tuple[int, int]] = []

    def bound(denoiser: Denoiser, tokens_RL: Tensor, samples: int, first_row: int) -> float:
        told.append((samples, first_row))
        return 2.0 * first_row

    with parallel.join(ParallelConfig()) as mesh:
        learner = Learner(objective(), TrainConfig(bound_samples=3), mesh, ParallelConfig())
        rows = [(0, rows_RL), (5, rows_RL)]
        found = learner.validate({ALONE: rows}, {ALONE: 1.0}, {"any": bound})
    assert told == [(3, 0), (3, 5 * R)]
    assert found["validation/bound"] == found["validation/any"] == 5 * R


def test_the_learning_rate_rises_then_stays_or_falls() -> None:
    constant = partial(OptimizerConfig(lr=2.0, warmup=4).lr_at, steps=12)
    assert [constant(step) for step in (1, 2, 4, 5, 12)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = partial(OptimizerConfig(lr=2.0, warmup=4, schedule="cosine").lr_at, steps=12)
    assert [cosine(step) for step in (2, 4, 8, 12)] == pytest.approx([1.0, 2.0, 1.1, 0.2])
    falling = [cosine(step) for step in range(4, 13)]
    assert falling == sorted(falling, reverse=True)
    assert OptimizerConfig(lr=2.0, warmup=0).lr_at(1, 9) == 2.0


@pytest.mark.parametrize("shared", [False, True])
def test_mixed_precision_leaves_the_angles_of_positions_alone(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one worker computes, and as one of several does."""
    seen: list[tuple[torch.dtype, Tensor]] = []
    rotate = dsl.dit.rotate

    def watched(heads_BHLK: Tensor, turn_2LK: Tensor) -> Tensor:
        seen.append((heads_BHLK.dtype, turn_2LK))
        return rotate(heads_BHLK, turn_2LK)

    monkeypatch.setattr(dsl.dit, "rotate", watched)
    monkeypatch.setattr(parallel, "shared", lambda mesh: shared)
    config = ParallelConfig(compute_dtype="bfloat16")
    with parallel.join(config) as mesh:
        Learner(objective(), TrainConfig(), mesh, config).step(1, {0: rows_RL})
    expected_2LK = rotary(L, 8, torch.device("cpu"))
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}
    assert all(torch.equal(turn_2LK, expected_2LK) for _, turn_2LK in seen)
