"""The reference procedure does more work than ours and nothing else: it has the same law.

Shapes: B rows, L positions, V tokens, U = V + 1 outcomes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dsl
from dsl.noise import Draws, generator
from dsl.objective import MDLMObjective
from dsl.paths.clock import Clock
from dsl.posterior import Denoises
from dsl.state import State
from dsl.truncation import Truncated
from pipelines.benchmarks import reference
from tests.dsl.laws import chi_square_p, random_law
from tests.pipelines.benchmarks import small

CAP = dsl.paths.Remask(rule="cap", eta=0.1)


def sample(
    denoiser: Denoises, chances: Callable[[int], tuple[float, float]], state: State, budget: int
) -> Tensor:
    """Tokens ``[B, L]`` after ``budget`` calls; chances to reveal and to mask again by call."""
    draws = torch.Generator().manual_seed(0)
    for call in range(budget):
        state = reference.step(denoiser, state, chances(call), 1.0, draws)
    return state.tokens_BL


def chances(call: int, budget: int) -> tuple[float, float]:
    return CAP.chances(Clock(call=call, budget=budget, draws=Draws(0, 0, call)))


def half_revealed() -> State:
    """Of a law over three tokens and four positions: positions 0 and 2 revealed."""
    table_VD = random_law(tokens=3, length=4, dim=2, seed=0).table_VD
    gamma_BL = torch.tensor([[torch.inf, 0.0, torch.inf, 0.0]])
    known_BL = torch.zeros(1, 4, dtype=torch.bool)
    return State.from_tokens(table_VD, torch.tensor([[2, 0, 1, 0]]), known_BL, gamma_BL)


@pytest.mark.parametrize("p", [1.0, 0.7])
def test_a_step_has_the_probabilities_of_ours(p: float) -> None:
    denoiser, state = random_law(tokens=3, length=4, dim=2, seed=0).denoiser(), half_revealed()
    reveal, remask = chances(5, 8)
    assert 0 < remask < 1
    probs_BLU = reference.outcomes(denoiser, state, reveal, remask, p)
    sharp_BLV = Truncated(denoiser, 1.0, p, "drop")(state).log_probs().exp()
    torch.testing.assert_close(probs_BLU.sum(-1), torch.ones(1, 4, dtype=torch.float64))
    torch.testing.assert_close(probs_BLU[0, 1::2, :3], reveal * sharp_BLV[0, 1::2])
    assert probs_BLU[0, 0, 2] == probs_BLU[0, 2, 1] == 1 - remask
    torch.testing.assert_close(probs_BLU[0, ::2, 3], probs_BLU.new_full((2,), remask))


def test_draws_have_their_probabilities() -> None:
    probs_U = torch.tensor([0.5, 0.3, 0.0, 0.2], dtype=torch.float64)
    outcome_BL = reference.draw(probs_U.expand(100, 100, 4), torch.Generator().manual_seed(0))
    assert chi_square_p(outcome_BL.flatten().bincount(minlength=4), probs_U) > 1e-4


def test_draws_have_float64_noise() -> None:
    """As public code has, whose time it is compared by."""
    probs_BLU = torch.full((2, 3, 5), 0.2)
    noise_BLU = torch.rand(
        probs_BLU.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    outcome_BL = reference.draw(probs_BLU, torch.Generator().manual_seed(0))
    assert torch.equal(outcome_BL, (1 / -noise_BLU.log()).argmax(-1))


def ours(law: dsl.ExactDenoiser, rows: int) -> Tensor:
    path = dsl.paths.Remask(rule="cap", eta=0.1)
    return dsl.sample(law, path, State.masked(rows, 2, 2), budget=24, seed=0).tokens_BL


def public(law: dsl.ExactDenoiser, rows: int) -> Tensor:
    state = State.masked(rows, 2, 2, dtype=torch.float64)
    return sample(law, lambda call: chances(call, 24), state, 24)


def test_whole_runs_have_the_law_of_ours() -> None:
    """Re-masking in parallel is not exact, so each is held against the other."""
    rows = 4000
    law = random_law(tokens=3, length=2, dim=2, seed=1)
    counts = [
        law.index(draw(law.denoiser(), rows)).bincount(minlength=len(law.p_S))
        for draw in (ours, public)
    ]
    pooled_S = (counts[0] + counts[1]).double()
    assert min(chi_square_p(count_S, pooled_S) for count_S in counts) > 1e-3


def test_the_loss_is_that_of_ours() -> None:
    denoiser = small.denoiser(small.MODEL.mdlm())
    objective = MDLMObjective(denoiser)
    tokens_BL = torch.randint(small.MODEL.tokens, (4, 16), generator=torch.Generator())
    theirs = reference.mdlm_loss(denoiser, tokens_BL, generator(0, 3, 0))
    loss = objective(tokens_BL, generator(0, 3, 0)).value
    assert loss > 0
    torch.testing.assert_close(theirs, loss)
    trained = [p for p in denoiser.backbone.parameters() if p.requires_grad]
    for mine, yours in zip(
        torch.autograd.grad(loss, trained, allow_unused=True),
        torch.autograd.grad(theirs, trained, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(yours, mine, rtol=1e-4, atol=1e-6)


def test_the_nucleus_drops_what_crosses_p() -> None:
    probs_BLV = torch.tensor([[[0.5, 0.3, 0.2], [0.95, 0.03, 0.02]]], dtype=torch.float64)
    kept_BLV = reference.nucleus(probs_BLV, 0.8)
    torch.testing.assert_close(kept_BLV[0, 0], kept_BLV.new_tensor([0.625, 0.375, 0.0]))
    torch.testing.assert_close(kept_BLV[0, 1], kept_BLV.new_tensor([1.0, 0.0, 0.0]))
