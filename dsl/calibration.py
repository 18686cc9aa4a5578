"""Calibration of a denoiser: reliability by SNR under teacher forcing (004 fig. 4).

Shapes: B rows, L positions, V tokens, K bins, N positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsl.channel import observe
from dsl.noise import Draws
from dsl.posterior import Denoises
from dsl.state import token_ids


@dataclass(frozen=True)
class Reliability:
    """Counts of predictions by confidence, in K bins of equal width; each field ``[K]`` float64.

    Per bin: how many predictions, the sum of their confidence, how many were right. ``a + b`` joins
    the counts of two batches.
    """

    count_K: Tensor
    confidence_K: Tensor
    right_K: Tensor

    def __add__(self, other: "Reliability") -> "Reliability":
        return Reliability(
            self.count_K + other.count_K,
            self.confidence_K + other.confidence_K,
            self.right_K + other.right_K,
        )

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1]: ``sum_k n_k/n |accuracy_k - confidence_k|``."""
        gap = (self.right_K - self.confidence_K).abs().sum() / self.count_K.sum()
        return gap.item()


def reliability(confidence_N: Tensor, right_N: Tensor, bins: int = 10) -> Reliability:
    """Bin predictions ``[N]`` by confidence in (0, 1]; a bin holds its upper edge.

    right_N: whether each prediction was right.

    Raises:
        ValueError: a confidence lies outside [0, 1] or is NaN.
    """
    confidence_N = confidence_N.double().cpu()
    # A float32 softmax may sum to a little more than 1.
    if not ((confidence_N >= 0) & (confidence_N <= 1 + 1e-4)).all():
        raise ValueError("confidence must lie in [0, 1]: it is outside or NaN somewhere")
    bin_N = ((confidence_N * bins).ceil().long() - 1).clamp(0, bins - 1)

    def total(weight_N: Tensor) -> Tensor:
        # Of nothing, the library counts in integers.
        return torch.bincount(bin_N, weights=weight_N.double().cpu(), minlength=bins).double()

    return Reliability(total(torch.ones_like(confidence_N)), total(confidence_N), total(right_N))


@torch.no_grad()
def calibration(
    denoiser: Denoises,
    tokens_BL: Tensor,
    *,
    gammas: Sequence[float],
    seed: int,
    first_row: int = 0,
    bins: int = 10,
) -> dict[float, Reliability]:
    """Reliability of the likeliest token at every position, by SNR, one denoiser call each.

    ``tokens_BL`` are given texts, not samples (teacher forcing). At each of ``gammas``, in
    [0, inf), all their tokens are seen through the channel at that SNR.

    Raises:
        ValueError: a gamma is negative, infinite (a revealed token is not predicted) or NaN; or the
            texts are not `dsl.state.token_ids`.
    """
    table_VD = denoiser.table_VD
    tokens_BL = token_ids(tokens_BL, table_VD)
    at_N = torch.arange(tokens_BL.numel(), device=table_VD.device)
    by_snr = {}
    for step, gamma in enumerate(gammas):
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma must be finite and at least 0, got {gamma}")
        gamma_BL = torch.full(tokens_BL.shape, gamma, dtype=torch.float64)
        state = observe(table_VD, tokens_BL, gamma_BL, Draws(seed, first_row, step))
        top_N2 = denoiser(state).summarise(_top, at_N)
        right_N = top_N2[:, 1] == tokens_BL.flatten()
        by_snr[gamma] = reliability(top_N2[:, 0], right_N, bins)
    return by_snr


def _top(log_probs_NV: Tensor) -> Tensor:
    """Confidence and id of the likeliest token, ``[N, 2]`` float64."""
    log_prob_N, token_N = log_probs_NV.max(1)
    return torch.stack([log_prob_N.double().exp(), token_N.double()], dim=1)
