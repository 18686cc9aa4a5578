"""Losses: DSL fine-tuning, and the MDLM and AR pre-training it starts from or is judged by.

An objective is a module whose ``forward`` computes the loss. Sharding (FSDP) gathers parameters
around the forward of the root module, so all that take part, the head's included, are used inside
it. They are the same on every batch: ranks that reduce gradients together never disagree about
which exist.

The generator that a forward takes lies on the CPU. The CPU then knows the shapes of everything that
depends on the draws, and never waits for a GPU to tell them.

Shapes: B rows, L positions, V tokens, D table dimension, W backbone width, N predicted positions
(flat, in [0, B·L)).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dsl.channel import observe
from dsl.denoiser import Denoiser
from dsl.head import nats
from dsl.state import State, flat, send
from dsl.support import Support, stratified

# Where the integral over t starts, as in the public MDLM: the weight 1/t has infinite variance
# on (0, 1]. It moves the bound by a share of about EPS.
EPS = 1e-3


class Loss(NamedTuple):
    """``value``, the scalar to differentiate, and ``metrics``, detached scalars to log.

    All are sums divided by the batch's B·L tokens and never NaN, so they may be averaged over
    batches of one shape. The cross-entropy of a masked position is ``masked_nats / masked_share``.
    """

    value: Tensor
    metrics: dict[str, Tensor]


def cross_entropy(
    denoiser: Denoiser,
    state: State,
    tokens_BL: Tensor,
    at_N: Tensor,
    weight_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``-log p(tokens | state)`` at flat positions ``at_N``, in float32 or better.

    Returns their weighted sum divided by B·L, a scalar to differentiate, and the nats ``[N]``
    themselves. The head runs at these positions only, see `dsl.head`: no ``[N, V]`` exists.

    weight_N: on the CPU; 1 by default.
    """
    weight_N = torch.ones(len(at_N)) if weight_N is None else weight_N
    share_N = send(weight_N.to(denoiser.table_VD.dtype) / tokens_BL.numel(), tokens_BL.device)
    at_N = send(at_N, tokens_BL.device)
    hidden_NW = denoiser.hidden(state).flatten(0, 1)[at_N]
    skip, tokens_N = denoiser.skip(state, at_N), tokens_BL.flatten()[at_N]
    return nats(hidden_NW, *denoiser.backbone.head, *skip, tokens_N, share_N, denoiser.passes)


class DSLObjective(nn.Module):
    """Cross-entropy of the unrevealed tokens at SNRs drawn from a support (000 §4.5)."""

    def __init__(self, denoiser: Denoiser, support: Support) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.support = support

    def forward(self, tokens_BL: Tensor, generator: torch.Generator) -> Loss:
        """``-(1/BL) sum_i log p(s_i | z)``; a revealed token is known and adds exactly 0."""
        rows, length = tokens_BL.shape
        gamma_BL = self.support.sample(rows, length, generator)
        state = observe(self.denoiser.table_VD, tokens_BL, gamma_BL, generator)
        at_N = flat(~state.host.revealed_BL)
        value, nats_N = cross_entropy(self.denoiser, state, tokens_BL, at_N)
        masked_N = state.host.masked_BL.flatten()[at_N]
        return Loss(
            value=value,
            metrics=_part("masked", nats_N, masked_N, tokens_BL)
            | _part("evidence", nats_N, ~masked_N, tokens_BL),
        )

    def flops_per_token(self, length: int) -> float:
        """Expected cost of a training step, see `Denoiser.flops_per_token`."""
        return self.denoiser.flops_per_token(length, **self.support.shares(length)._asdict())


class MDLMObjective(nn.Module):
    """The masked-diffusion bound with the log-linear schedule (SUBS, arXiv 2406.07524).

    Each row draws t in (EPS, 1], stratified over the batch, and masks each token with
    probability t. The table and the converter take no part: the constructor freezes them.

    ``weighting="flat"`` leaves the bound's weights 1/t out. The optimal prediction stays the same.
    Small batches learn it in fewer steps, because no row of small t outweighs hundreds of others.
    The loss is then the cross-entropy at masked tokens, and no bound.

    Raises:
        ValueError: another weighting.
    """

    def __init__(self, denoiser: Denoiser, weighting: Literal["bound", "flat"] = "bound") -> None:
        super().__init__()
        if weighting not in ("bound", "flat"):
            raise ValueError(f"weighting must be 'bound' or 'flat', got {weighting!r}")
        self.denoiser = _freeze_evidence(denoiser)
        self.weighting = weighting

    def forward(self, tokens_BL: Tensor, generator: torch.Generator) -> Loss:
        """``(1/BL) sum_masked -log p(s_i | z) / t``, in expectation an upper bound of the NLL;
        without ``/ t``, and no bound, where the weighting is flat."""
        t_B1 = 1 - (1 - EPS) * stratified(len(tokens_BL), generator)[:, None]
        uniform_BL = torch.rand(
            tokens_BL.shape, generator=generator, dtype=t_B1.dtype, device=generator.device
        )
        gamma_BL = torch.where(uniform_BL < t_B1, 0.0, torch.inf)
        state = observe(self.denoiser.table_VD, tokens_BL, gamma_BL, generator)
        at_N = flat(state.host.masked_BL)
        weight_B1 = 1 / t_B1 if self.weighting == "bound" else torch.ones_like(t_B1)
        weight_N = weight_B1.expand_as(tokens_BL).flatten()[at_N]
        value, nats_N = cross_entropy(self.denoiser, state, tokens_BL, at_N, weight_N)
        return Loss(
            value=value,
            metrics=_part("masked", nats_N, torch.ones_like(at_N, dtype=torch.bool), tokens_BL),
        )

    def flops_per_token(self, length: int) -> float:
        """Expected cost of a training step, see `Denoiser.flops_per_token`."""
        return self.denoiser.flops_per_token(length, predicted=(1 + EPS) / 2, evidence=0.0)


class ARObjective(nn.Module):
    """The exact NLL of a causal denoiser, which predicts token i from the tokens before it.

    The table and the converter take no part: the constructor freezes them.

    Raises:
        ValueError: the backbone is not causal, so it would be shown what it predicts.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        if not denoiser.config.backbone.causal:
            raise ValueError("the ar objective needs a backbone with causal=True")
        self.denoiser = _freeze_evidence(denoiser)

    def forward(self, tokens_BL: Tensor, generator: torch.Generator) -> Loss:
        """``-(1/BL) sum_i log p(s_i | s_<i)``, in one pass; nothing is drawn."""
        gamma_BL = torch.full(tokens_BL.shape, torch.inf)
        state = observe(self.denoiser.table_VD, tokens_BL, gamma_BL, generator)
        at_N = torch.arange(tokens_BL.numel())
        value, _ = cross_entropy(self.denoiser, state, tokens_BL, at_N)
        return Loss(value, metrics={})

    def flops_per_token(self, length: int) -> float:
        """Cost of a training step, see `Denoiser.flops_per_token`."""
        return self.denoiser.flops_per_token(length, predicted=1.0, evidence=0.0)


Objective = DSLObjective | MDLMObjective | ARObjective


def _freeze_evidence(denoiser: Denoiser) -> Denoiser:
    denoiser.table.requires_grad_(False)
    denoiser.converter.requires_grad_(False)
    return denoiser


def _part(name: str, nats_N: Tensor, of_N: Tensor, tokens_BL: Tensor) -> dict[str, Tensor]:
    """Metrics of those of N positions where ``of_N`` is true (bool, on the CPU): their nats, and
    their number, each divided by the tokens of the batch."""
    tokens, at_K = tokens_BL.numel(), flat(of_N)
    return {
        f"{name}_nats": nats_N.detach()[send(at_K, nats_N.device)].sum() / tokens,
        f"{name}_share": nats_N.new_full((), len(at_K) / tokens),
    }
