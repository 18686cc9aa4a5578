"""The reference procedure: what public samplers and losses of masked diffusion do in each step.

Written from their description, so that a comparison needs none of their code: they compute the
head at every position, sort all V tokens for the nucleus, draw one float64 noise for every token
and position, and evaluate the network even where nothing has changed. The procedure is slow on
purpose and has the same law as `dsl`.

Shapes: B rows, L positions, V tokens, U = V + 1 outcomes (the last is to be masked).
"""

from __future__ import annotations

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

IMPOSSIBLE = -1e6  # a log-probability whose exponential is 0


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
        reveal: chance that an unrevealed token is drawn.
        remask: chance that a revealed one is masked again (arXiv 2503.00307).
        p: nucleus; 1 cuts nothing.
    """
    probs_BLV = denoiser(state).log_probs().exp()  # one-hot where revealed
    if p < 1:
        probs_BLV = nucleus(probs_BLV, p)
    token_BL1 = probs_BLV.new_tensor([reveal, 1 - remask])[state.revealed_BL.long(), None]
    return torch.cat([token_BL1 * probs_BLV, 1 - token_BL1], dim=-1)


def draw(probs_BLU: Tensor, generator: torch.Generator) -> Tensor:
    """Outcomes ``[B, L]`` by Gumbel-argmax in float64, in its form as a race of exponentials."""
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
    """The state after one call; ``chances`` are `reveal` and `remask` of `outcomes`."""
    outcome_BL = draw(outcomes(denoiser, state, *chances, p), generator)
    masked_BL = outcome_BL == len(denoiser.table_VD)
    return replace(
        state,
        tokens_BL=outcome_BL.masked_fill(masked_BL, 0),
        gamma_BL=torch.where(masked_BL, 0.0, torch.inf).to(state.gamma_BL),
    )


def mdlm_loss(denoiser: Denoiser, tokens_BL: Tensor, generator: torch.Generator) -> Tensor:
    """The loss of `dsl.objective.MDLMObjective` with the same draws, computed over ``[B, L, V]``.

    Log-probabilities at known positions are overwritten, which takes two more passes.
    """
    t_B1 = 1 - (1 - EPS) * stratified(len(tokens_BL), generator)[:, None]
    uniform_BL = torch.rand(
        tokens_BL.shape, generator=generator, dtype=t_B1.dtype, device=generator.device
    )
    gamma_BL = torch.where(uniform_BL < t_B1, 0.0, torch.inf)
    state = observe(denoiser.table_VD, tokens_BL, gamma_BL, generator)
    logits_BLV = F.linear(denoiser.hidden(state), *denoiser.backbone.head).float()
    log_probs_BLV = logits_BLV - logits_BLV.logsumexp(-1, keepdim=True)
    known_BL = state.revealed_BL
    log_probs_BLV[known_BL] = IMPOSSIBLE
    log_probs_BLV[known_BL, tokens_BL[known_BL]] = 0.0
    nats_BL = -log_probs_BLV.gather(-1, tokens_BL[..., None]).squeeze(-1)
    return (nats_BL / t_B1.to(nats_BL)).sum() / tokens_BL.numel()
