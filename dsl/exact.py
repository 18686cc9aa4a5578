"""The Bayes denoiser of a law small enough to enumerate: the yardstick of every test.

Shapes: B rows, L positions, V tokens, D table dimension, S sequences of the law, N asked
positions, R rows.
"""

import torch
from torch import Tensor

from dsl.posterior import Posterior
from dsl.state import State, token_ids


class ExactDenoiser:
    """``p(s_i | state)`` of the law that puts ``weights`` on ``sequences`` (003 A.1).

    Each sequence is weighed by ``w_s exp(sum_i z_i · x_{s_i})`` over its tokens at finite SNR,
    and must agree with every revealed token. Where no sequence agrees, those that maximise
    ``sum_i x_token · x_{s_i}`` over the revealed tokens remain, which is the limit of evidence as
    gamma goes to infinity. No probability is ever NaN.

    Args:
        table_VD: unit rows; its dtype is the dtype of the computation.
        sequences_NL: the S sequences of the law, int64 ids in [0, V).
        weights_N: S non-negative numbers, not all zero, normalised here; uniform by default.

    Raises:
        ValueError: other weights, or sequences that are not `dsl.state.token_ids`.
    """

    def __init__(
        self, table_VD: Tensor, sequences_NL: Tensor, weights_N: Tensor | None = None
    ) -> None:
        if weights_N is None:
            weights_N = torch.ones(len(sequences_NL))
        weights_N = weights_N.double()
        if weights_N.shape != sequences_NL.shape[:1] or not (weights_N >= 0).all():
            raise ValueError("weights must be one non-negative number per sequence")
        if not 0 < weights_N.sum() < torch.inf:
            raise ValueError("the weights must be finite and not all zero")
        self.table_VD = table_VD
        self.sequences_SL = token_ids(sequences_NL, table_VD)
        # In float64, because float32 takes weights below 1e-45 for 0.
        self.log_weights_S = (weights_N / weights_N.sum()).log().to(table_VD)

    def __call__(self, state: State) -> Posterior:
        state = state.like(self.table_VD)
        length, asked = self.sequences_SL.shape[1], state.gamma_BL.shape[1]
        if asked != length:
            raise ValueError(f"the law is of texts of {length} tokens, the state of {asked}")
        score_BS = self.log_weights_S + self._evidence(state) + self._agreement(state)
        return ExactPosterior(state, self.table_VD, self.sequences_SL, score_BS.softmax(-1))

    def _evidence(self, state: State) -> Tensor:
        """``sum_i z_i · x_{s_i}`` over tokens at finite SNR, ``[B, S]``. Masked ones add 0."""
        # One product and sum per entry, not a matmul: its rounding must not depend on B.
        score_BLV = (state.z_BLD[:, :, None] * self.table_VD).sum(-1)
        index_BSL = self.sequences_SL.expand(len(state.gamma_BL), -1, -1)
        return score_BLV.transpose(1, 2).gather(1, index_BSL).sum(-1)

    def _agreement(self, state: State) -> Tensor:
        """0 for sequences that the revealed tokens leave possible, -inf for others, ``[B, S]``."""
        known_B1L = state.revealed_BL[:, None]
        wrong_BS = ((state.tokens_BL[:, None] != self.sequences_SL) & known_B1L).sum(-1)
        # Sequences of weight zero are not part of the law, whatever they agree with.
        possible_S = self.log_weights_S.isfinite()
        agrees_BS = (wrong_BS == 0) & possible_S

        rows_BLD = self.table_VD[state.tokens_BL]
        cosine_BLV = (rows_BLD[:, :, None] * self.table_VD).sum(-1)
        index_BSL = self.sequences_SL.expand(len(state.gamma_BL), -1, -1)
        cosine_BSL = cosine_BLV.transpose(1, 2).gather(1, index_BSL)
        likeness_BS = (cosine_BSL * known_B1L).sum(-1).masked_fill(~possible_S, -torch.inf)
        best_B1 = likeness_BS.amax(1, keepdim=True)
        # Equal sums may differ by the order of their rounding.
        tolerance = 16 * torch.finfo(likeness_BS.dtype).eps * max(1, state.gamma_BL.shape[1])
        nearest_BS = likeness_BS >= best_B1 - tolerance

        keep_BS = torch.where(agrees_BS.any(1, keepdim=True), agrees_BS, nearest_BS)
        return torch.zeros_like(likeness_BS).masked_fill(~keep_BS, -torch.inf)


class ExactPosterior(Posterior):
    """Marginals of a weighted set of sequences, one weight vector ``weights_BS`` a row."""

    by_row = ("weights_BS",)

    def __init__(
        self, state: State, table_VD: Tensor, sequences_SL: Tensor, weights_BS: Tensor
    ) -> None:
        super().__init__(state, table_VD)
        self.sequences_SL = sequences_SL
        self.weights_BS = weights_BS

    def _log_probs_unrevealed(self, at_N: Tensor) -> Tensor:
        length = self.sequences_SL.shape[1]
        weights_NS = self.weights_BS[at_N // length]
        tokens_NS = self.sequences_SL.T[at_N % length]
        probs_NV = weights_NS.new_zeros(len(at_N), len(self.table_VD))
        probs_NV.scatter_add_(1, tokens_NS, weights_NS)
        probs_NV = probs_NV / probs_NV.sum(-1, keepdim=True)
        # Not log(0): its derivative is 0/0, and curvature differentiates the posterior.
        tiny = torch.finfo(probs_NV.dtype).tiny
        return probs_NV.clamp_min(tiny).log().masked_fill(probs_NV == 0, -torch.inf)
