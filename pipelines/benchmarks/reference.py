"""The reference procedure: what public samplers and losses of masked diffusion do per step.

Written from their description, so that a comparison with them needs none of their code: the head
at every position of every step, the nucleus by sorting all V tokens of each, one float64 noise for
every token and position, and no state that is not evaluated again. Slow on purpose, and of the
same law as `dsl`.

Shapes: B rows, L positions, V tokens, U = V + 1 outcomes (the last is to be masked).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dsl.channel import observe
from dsl.denoiser import Denoiser
from dsl.objective import EPS
from dsl.posterior import Denoises
from dsl.state import State
from dsl.support import stratified

UNLIKELY = -1e6  # a log-probability that no sum of them notices


def nucleus(probs_BLV: Tensor, p: float) -> Tensor:
    """The likeliest tokens of total probability at most ``p``, at least one, normalised.

    The token with which the sum passes p is dropped, as in public ReMDM.
    """
    sorted_BLV, token_BLV = probs_BLV.sort(dim=-1, descending=True)
    stays_BLV = sorted_BLV.cumsum(-1) <= p
    stays_BLV[..., 0] = True
    kept_BLV = torch.zeros_like(probs_BLV).scatter_(-1, token_BLV, sorted_BLV * stays_BLV)
    return kept_BLV / kept_BLV.sum(-1, keepdim=True)


def outcomes(denoiser: Denoises, state: State, reveal: float, remask: float, p: float) -> Tensor:
    """``[B, L, U]`` probabilities of what each token becomes in one step.

    Args:
        reveal: chance of an unrevealed token to be drawn.
        remask: chance of a revealed one to be masked again (arXiv 2503.00307).
        p: nucleus; 1 cuts nothing.
    """
    probs_BLV = denoiser(state).log_probs().exp()  # one-hot where revealed
    if p < 1:
        probs_BLV = nucleus(probs_BLV, p)
    token_BL1 = probs_BLV.new_tensor([reveal, 1 - remask])[state.revealed_BL.long(), None]
    return torch.cat([token_BL1 * probs_BLV, 1 - token_BL1], dim=-1)


def draw(probs_BLU: Tensor, generator: torch.Generator) -> Tensor:
    """Outcomes ``[B, L]``: Gumbel-argmax in float64, as a race of exponential clocks."""
    noise_BLU = torch.rand(
        probs_BLU.shape, generator=generator, dtype=torch.float64, device=probs_BLU.device
    )
    return (probs_BLU / -noise_BLU.log()).argmax(-1)


@torch.no_grad()
def step(
    denoiser: Denoises,
    state: State,
    chances: tuple[float, float],
    p: float,
    generator: torch.Generator,
) -> State:
    """The state after one call; ``chances`` to reveal and to mask again as in `outcomes`."""
    outcome_BL = draw(outcomes(denoiser, state, *chances, p), generator)
    masked_BL = outcome_BL == len(denoiser.table_VD)
    return replace(
        state,
        tokens_BL=outcome_BL.masked_fill(masked_BL, 0),
        gamma_BL=torch.where(masked_BL, 0.0, torch.inf).to(state.gamma_BL),
    )


def sample(
    denoiser: Denoises,
    chances: Callable[[int], tuple[float, float]],
    state: State,
    *,
    budget: int,
    p: float,
    generator: torch.Generator,
) -> Tensor:
    """Tokens ``[B, L]`` after ``budget`` calls, of which none is spared.

    Args:
        chances: to reveal and to mask again, of a call counted from 0.
        state: of endpoints only, nothing frozen.
    """
    for call in range(budget):
        state = step(denoiser, state, chances(call), p, generator)
    return state.tokens_BL


def mdlm_loss(denoiser: Denoiser, tokens_BL: Tensor, generator: torch.Generator) -> Tensor:
    """`dsl.objective.MDLMObjective`'s loss, of the same draws, by way of ``[B, L, V]``.

    What is known is written over what the head said of it, which takes two passes more.
    """
    t_B1 = 1 - (1 - EPS) * stratified(len(tokens_BL), generator)[:, None]
    uniform_BL = torch.rand(
        tokens_BL.shape, generator=generator, dtype=t_B1.dtype, device=generator.device
    )
    gamma_BL = torch.where(uniform_BL < t_B1, 0.0, torch.inf)
    state = observe(denoiser.table_VD, tokens_BL, gamma_BL, generator)
    logits_BLV = F.linear(denoiser.hidden(state), *denoiser.head).float()
    log_probs_BLV = logits_BLV - logits_BLV.logsumexp(-1, keepdim=True)
    known_BL = state.revealed_BL
    log_probs_BLV[known_BL] = UNLIKELY
    log_probs_BLV[known_BL, tokens_BL[known_BL]] = 0.0
    nats_BL = -log_probs_BLV.gather(-1, tokens_BL[..., None]).squeeze(-1)
    return (nats_BL / t_B1.to(nats_BL)).sum() / tokens_BL.numel()
