"""The device against the CPU: loss and gradients from the same weights and noise, and the texts
that exact laws draw along every path.

Shapes: S sequences of a law, B rows, L positions, V tokens.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import dsl
from dsl import channel, dit, paths
from dsl.noise import Draws
from dsl.objective import Objective
from dsl.paths import AnyPath
from dsl.posterior import Denoises
from dsl.state import State
from pipelines.benchmarks import train
from pipelines.benchmarks.results import Bar
from pipelines.gpu_check.findings import Finding
from pipelines.gpu_check.settings import OBJECTIVES, Check, Named

Device = torch.device
ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-9}  # of relative difference
SDE = paths.SentenceSDE(gamma_max=20.0)
PATHS: dict[str, AnyPath] = {
    "masked": paths.Masked(),
    "remask cap": paths.Remask(rule="cap"),
    "remask rescale": paths.Remask(rule="rescale"),
    "remask conf": paths.Remask(rule="conf"),
    "remask loop": paths.Remask(rule="loop"),
    "remask forward_backward": paths.Remask(rule="forward_backward"),
    "order": paths.Order("random"),
    "entropy_bounded": paths.EntropyBounded(bound=0.5),
    "sentence_sde": SDE,
    "token_sde": paths.TokenSDE(gamma_max=20.0, delta=0.1),
    "token_sde jvp": paths.TokenSDE(gamma_max=20.0, delta=0.1, curvature="jvp"),
    "second_order": paths.SecondOrder(SDE),
    "hybrid": paths.Hybrid(SDE, paths.Masked(), split=(4, 4)),
}
TOKENS, LENGTH, DIM, ROWS, BUDGET = 3, 5, 4, 64, 8  # of the laws and their texts


def run(check: Check) -> Iterator[Finding]:
    with noise_of_the_cpu():
        for name in OBJECTIVES:
            for dtype in ALLOWED:
                yield from _of_loss(check, name, dtype)
        yield from _of_texts(check)
    yield from _of_batches(check)


@contextmanager
def noise_of_the_cpu() -> Iterator[None]:
    """Inside the block, normals are drawn on the CPU, whatever the device that they are for."""
    keyed = Draws.normal

    def of_draws(draws: Draws, shape: torch.Size, dtype: torch.dtype, device: Device) -> Tensor:
        return keyed(draws, shape, dtype).to(device)

    def of_generator(
        shape: torch.Size, dtype: torch.dtype, device: Device, source: torch.Generator
    ) -> Tensor:
        return torch.randn(shape, generator=source, dtype=dtype).to(device)

    with (
        mock.patch.object(Draws, "normal", of_draws),
        mock.patch.object(channel, "standard_normal", of_generator),
    ):
        yield


@contextmanager
def angles_of_the_cpu() -> Iterator[None]:
    """Inside the block, the angles of positions are computed on the CPU, whatever the device.

    They are of float32 in float64 networks too, where the last bit is a device's own.
    """
    turn = dit.rotary

    def rotary(length: int, head_dim: int, device: Device) -> Tensor:
        return turn(length, head_dim, torch.device("cpu")).to(device)

    with mock.patch.object(dit, "rotary", rotary):
        yield


def _of_loss(check: Check, name: Named, dtype: torch.dtype) -> Iterator[Finding]:
    tokens_BL = torch.from_numpy(
        train.microbatch(check.benchmark(rows=2, length=check.sizes.parity_length))
    )
    here = check.objective(name, torch.device("cpu")).to(dtype)
    there = copy.deepcopy(here).to(check.device)
    losses = []
    with angles_of_the_cpu() if dtype == torch.float64 else nullcontext():
        for objective in (here, there):
            noise = torch.Generator().manual_seed(1)
            loss = objective(tokens_BL.to(objective.denoiser.table_VD.device), noise).value
            loss.backward()
            losses.append(loss.detach().cpu())
    bar = Bar("≤", ALLOWED[dtype], here=check.gpu)
    kind = f"{name}, {str(dtype).removeprefix('torch.')}"
    yield Finding(f"loss of {kind}: relative difference", _apart(*losses), "", bar)
    ours, theirs = (_gradients(objective) for objective in (here, there))
    whole = [torch.cat([part.flatten() for part in side.values()]) for side in (ours, theirs)]
    yield Finding(f"gradient of {kind}: relative difference", _apart(*whole), "", bar)
    if dtype == torch.float64:  # a small part of the gradient is lost among the others' rounding
        apart = {part: _apart(ours[part], theirs[part]) for part in ours}
        worst = max(apart, key=lambda part: apart[part])
        what = f"gradient of {kind}: largest relative difference of a parameter ({worst})"
        yield Finding(what, apart[worst], "", bar)


def _gradients(objective: Objective) -> dict[str, Tensor]:
    """By parameter, on the CPU."""
    return {
        name: parameter.grad.cpu()
        for name, parameter in objective.named_parameters()
        if parameter.grad is not None
    }


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over the norm of ours."""
    norm = ours.double().norm().clamp_min(1e-300)
    return ((ours.double() - theirs.double()).norm() / norm).item()


def _of_texts(check: Check) -> Iterator[Finding]:
    laws = zip(_laws(torch.device("cpu")), _laws(check.device), strict=True)
    for (law, here), (_, there) in laws:
        differ = {
            name: int((_texts(here, path) != _texts(there, path)).any(1).sum())
            for name, path in PATHS.items()
        }
        bar = Bar("≤", 0, here=check.gpu)
        which = ", ".join(name for name, rows in differ.items() if rows) or "on every path"
        what = f"texts of the {law} law that differ from the CPU's ({which})"
        yield Finding(what, sum(differ.values()), f"of {len(differ) * ROWS}", bar)


def _of_batches(check: Check) -> Iterator[Finding]:
    """By the device's own noise."""
    for law, denoiser in _laws(check.device):
        pairs = (
            (_texts(denoiser, path)[ROWS // 2 :], _texts(denoiser, path, half=True))
            for path in PATHS.values()
        )
        differ = sum(int((whole != half).any(1).sum()) for whole, half in pairs)
        what = f"texts of the {law} law that depend on the batch"
        yield Finding(what, differ, f"of {len(PATHS) * ROWS // 2}", Bar("≤", 0))


def _texts(law: Denoises, path: AnyPath, *, half: bool = False) -> Tensor:
    """``[B, L]`` on the CPU. half: of the rows that are the second half of the whole batch."""
    rows = ROWS // 2 if half else ROWS
    state = State.masked(rows, LENGTH, DIM)
    drawn = dsl.sample(law, path, state, budget=BUDGET, seed=3, first_row=ROWS - rows)
    return drawn.tokens_BL.cpu()


def _laws(device: torch.device) -> Iterator[tuple[str, Denoises]]:
    """The same laws on any device, in float64: one that is enumerated, and a Markov chain."""
    draws = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draws, dtype=torch.float64)

    table_VD = F.normalize(uniform(TOKENS, DIM) - 0.5, dim=1).to(device)
    sequences_SL = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
    weights_S = uniform(len(sequences_SL)).pow(3)
    yield "enumerated", dsl.ExactDenoiser(table_VD, sequences_SL, weights_S)
    initial_V, transition_VV = uniform(TOKENS).softmax(0), (3 * uniform(TOKENS, TOKENS)).softmax(1)
    yield "chain", dsl.ChainDenoiser(table_VD, initial_V.to(device), transition_VV.to(device))
