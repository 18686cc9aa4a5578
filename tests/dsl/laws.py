"""Laws small enough to enumerate, and the statistics that compare samples with them.

Shapes: S sequences of a law, L positions, V tokens, D table dimension, B rows.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsl.exact import ExactDenoiser
from dsl.posterior import Posterior
from dsl.state import State


@dataclass(frozen=True, kw_only=True)
class Law:
    """Probabilities ``p_S`` over sequences ``[S, L]`` of tokens with table ``[V, D]``."""

    table_VD: Tensor
    sequences_SL: Tensor
    p_S: Tensor

    def denoiser(self) -> ExactDenoiser:
        return ExactDenoiser(self.table_VD, self.sequences_SL, self.p_S)

    def draw(self, rows: int, seed: int) -> Tensor:
        """``[B, L]`` texts of the law."""
        generator = torch.Generator().manual_seed(seed)
        return self.sequences_SL[
            torch.multinomial(self.p_S, rows, replacement=True, generator=generator)
        ]

    def index(self, tokens_BL: Tensor) -> Tensor:
        """``[B]``: which sequence each row is, S for a row outside the law's list."""
        same_BS = (tokens_BL[:, None] == self.sequences_SL).all(-1)
        return torch.where(same_BS.any(1), same_BS.int().argmax(1), len(self.p_S))

    def nats(self, tokens_BL: Tensor) -> Tensor:
        """``[B]``: exact -log P(x) per token."""
        return -self.p_S[self.index(tokens_BL)].log() / tokens_BL.shape[1]

    def cross_entropies(self) -> Tensor:
        """``[S]``: the exact -log P(x) per token of every sequence."""
        return self.nats(self.sequences_SL)


def ring(tokens: int) -> Tensor:
    """Directions equally spaced on the circle, ``[V, 2]`` (003 C.1)."""
    angle_V = torch.arange(tokens, dtype=torch.float64) * (2 * math.pi / tokens)
    return torch.stack([angle_V.cos(), angle_V.sin()], dim=1)


def cyclic(symbols: int) -> Law:
    """All rotations of ABC…, equally likely, embedded on the circle (003 figure 1b)."""
    start_S = torch.arange(symbols)
    return Law(
        table_VD=ring(symbols),
        sequences_SL=(start_S[:, None] + start_S) % symbols,
        p_S=torch.full((symbols,), 1 / symbols, dtype=torch.float64),
    )


def two_bits() -> Law:
    """(0, 0) and (1, 1), equally likely: a decision that rests on z_1 + z_2 (000, Analysis)."""
    return Law(
        table_VD=torch.tensor([[1.0], [-1.0]], dtype=torch.float64),
        sequences_SL=torch.tensor([[0, 0], [1, 1]]),
        p_S=torch.tensor([0.5, 0.5], dtype=torch.float64),
    )


def random_law(tokens: int, length: int, dim: int, seed: int, sharpness: float = 1.5) -> Law:
    """Random weights on every one of the V^L sequences, and a random unit table."""
    generator = torch.Generator().manual_seed(seed)
    sequences_SL = torch.tensor(list(itertools.product(range(tokens), repeat=length)))
    logits_S = sharpness * torch.randn(len(sequences_SL), generator=generator, dtype=torch.float64)
    direction_VD = torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
    return Law(
        table_VD=F.normalize(direction_VD, dim=1),
        sequences_SL=sequences_SL,
        p_S=logits_S.softmax(0),
    )


class Written(Posterior):
    """The posterior that a test writes down: ``[N, V]`` by flat position, repeated as needed.

    ``asked`` counts the positions of every question.
    """

    def __init__(self, state: State, table_VD: Tensor, log_probs_NV: Tensor) -> None:
        super().__init__(state, table_VD)
        self.log_probs_NV = log_probs_NV
        self.asked: list[int] = []

    def _log_probs_unrevealed(self, at_N: Tensor) -> Tensor:
        self.asked.append(len(at_N))
        return self.log_probs_NV[at_N % len(self.log_probs_NV)]

    def with_rows(self, state: State, rows_R: Tensor, fresh: Posterior) -> Posterior:
        raise NotImplementedError


def chi_square_p(counts_K: Tensor, p_K: Tensor) -> float:
    """The chance of counts at least this far from ``p_K``; outcomes that are too rare to judge by
    themselves (fewer than five expected) are judged together."""
    total = counts_K.sum()
    counts_K, expected_K = counts_K.double(), p_K.double() / p_K.sum() * total
    if bool((counts_K[p_K == 0] > 0).any()):
        return 0.0
    rare_K = expected_K < 5
    if bool(rare_K.any()):
        counts_K = torch.cat([counts_K[~rare_K], counts_K[rare_K].sum()[None]])
        expected_K = torch.cat([expected_K[~rare_K], expected_K[rare_K].sum()[None]])
    keep_K = expected_K > 0
    statistic = ((counts_K - expected_K).square() / expected_K)[keep_K].sum()
    freedom = torch.tensor((int(keep_K.sum()) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


def law_p(law: Law, tokens_BL: Tensor) -> float:
    """The chance that samples of the law look at least as unlike it as these do."""
    counts_S = torch.bincount(law.index(tokens_BL), minlength=len(law.p_S) + 1)
    return chi_square_p(counts_S, torch.cat([law.p_S, law.p_S.new_zeros(1)]))


def total_variation(law: Law, tokens_BL: Tensor) -> float:
    """Distance in [0, 1] between the law and the frequencies of the samples."""
    counts_S = torch.bincount(law.index(tokens_BL), minlength=len(law.p_S) + 1)
    share_S = counts_S.double() / len(tokens_BL)
    return (share_S - torch.cat([law.p_S, law.p_S.new_zeros(1)])).abs().sum().item() / 2


def total_variation_bound(law: Law, rows: int, sigmas: float = 4.0) -> float:
    """What `total_variation` of ``rows`` true samples exceeds only beyond ``sigmas``.

    Its mean is at most half the sum of each share's standard error; changing one row changes it
    by at most 1/rows, so it exceeds the mean by t with chance exp(-2 rows t²) (McDiarmid).
    """
    mean = (law.p_S * (1 - law.p_S) / rows).sqrt().sum().item() / 2
    return mean + sigmas / (2 * math.sqrt(rows))


def normal_p(values: Tensor) -> float:
    """The chance that standard normals look at least as unlike normals as ``values`` do."""
    inner = torch.linspace(-3, 3, 25, dtype=torch.float64)
    counts_K = torch.bincount(
        torch.bucketize(values.flatten().double(), inner), minlength=len(inner) + 1
    )
    edges = torch.cat([inner.new_tensor([-torch.inf]), inner, inner.new_tensor([torch.inf])])
    return chi_square_p(counts_K, torch.special.ndtr(edges).diff())
