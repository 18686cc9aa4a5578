"""The Bayes denoiser of a Markov chain: exact for texts too long to enumerate.

Shapes: B rows, L positions, V tokens, D table dimension, N texts, K order, S = V^K histories,
R the V^(K-1) histories less their first token.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dsl.posterior import Posterior
from dsl.state import State, token_ids

# Stands for log 0. Finite, so that no sum and no derivative of a sum is ever NaN.
NEVER = -1e30
# The SNR that stands for infinity where revealed tokens contradict the chain.
CERTAIN = 1e6
# Bounds the messages of one chunk of rows to some 256 MiB of float64.
MOST_ELEMENTS = 2**25


class MarkovDenoiser(ABC):
    """``p(s_i | state)`` of a law with known marginals, given evidence on each position by itself.

    Evidence multiplies the probability of token v: at finite SNR by ``exp(z_i · x_v)`` (003 A.1),
    where a token is revealed by 0 for all others, at a masked position by 1. Where the law cannot
    produce the revealed tokens, the texts that maximise ``sum_i x_token · x_{s_i}`` over them
    remain, as for `ExactDenoiser`. Computed in float64.
    """

    table_VD: Tensor

    @abstractmethod
    def marginals(self, evidence_BLV: Tensor) -> tuple[Tensor, Tensor]:
        """Marginals of the law whose probability of each token is multiplied by
        ``exp(evidence_BLV)``.

        Returns normalised log-probabilities ``[B, L, V]`` and the log of the total mass ``[B]``.
        """

    @abstractmethod
    def log_prob(self, tokens_BL: Tensor) -> Tensor:
        """``log P(text)`` of each row ``[B]`` in nats, float64; at most `NEVER` if impossible."""

    @abstractmethod
    def draw(self, rows: int, length: int, seed: int) -> Tensor:
        """``[rows, length]`` texts of the law, int64; equal seeds give equal texts."""

    def __call__(self, state: State) -> Posterior:
        state = state.like(self.table_VD)
        agreeing_BLV = self._evidence(state)
        log_probs_BLV, total_B = self.marginals(agreeing_BLV)
        impossible_R = (total_B < NEVER / 2).nonzero().squeeze(1)
        if len(impossible_R):
            rows = state.rows(impossible_R.cpu())
            rows_BLD = CERTAIN * self.table_VD[rows.tokens_BL]
            near_BLV = torch.where(
                rows.revealed_BL[..., None],
                (rows_BLD[:, :, None] * self.table_VD).sum(-1),
                agreeing_BLV[impossible_R],
            )
            near_BLV, _ = self.marginals(near_BLV)
            log_probs_BLV = log_probs_BLV.index_copy(0, impossible_R, near_BLV)
        return ChainPosterior(state, self.table_VD, log_probs_BLV)

    def _evidence(self, state: State) -> Tensor:
        """Log-weight of every token by its position's own evidence, ``[B, L, V]``."""
        # One product and sum per entry, not a matmul: its rounding must not depend on B.
        score_BLV = (state.z_BLD[:, :, None] * self.table_VD).sum(-1)
        every_V = torch.arange(len(self.table_VD), device=score_BLV.device)
        other_BLV = state.revealed_BL[..., None] & (state.tokens_BL[..., None] != every_V)
        return score_BLV.masked_fill(other_BLV, NEVER)


class ChainDenoiser(MarkovDenoiser):
    """A Markov chain of order K, by messages forwards and backwards.

    A call costs ``O(B L V^(K + 1))``.

    Args:
        table_VD: unit rows.
        initial_V: probabilities of the first token; for order K, ``[V] * K``, of the first K.
        transition_VV: probabilities of the next token (last dimension) after each token; for
            order K, ``[V] * (K + 1)``, after the last K.

    Raises:
        ValueError: other shapes, or numbers that are not probabilities with sums of 1.
    """

    def __init__(self, table_VD: Tensor, initial_V: Tensor, transition_VV: Tensor) -> None:
        tokens, order = len(table_VD), initial_V.ndim
        if initial_V.shape != (tokens,) * order or transition_VV.shape != (tokens,) * (order + 1):
            raise ValueError(
                f"for {tokens} tokens and order K, initial must be [{tokens}] * K and transition "
                f"[{tokens}] * (K + 1), got {tuple(initial_V.shape)}, {tuple(transition_VV.shape)}"
            )
        require_probabilities("initial", initial_V.flatten())
        require_probabilities("transition", transition_VV)
        self.table_VD = table_VD.double()
        self.order = order
        self.initial = log(initial_V.to(self.table_VD))
        self.probs_VRV = transition_VV.to(self.table_VD).view(tokens, -1, tokens)
        self.transition_VRV = log(self.probs_VRV)
        self.all_possible = bool((self.probs_VRV > 0).all())

    @classmethod
    def fit(
        cls, table_VD: Tensor, tokens_NL: Tensor, order: int = 1, smoothing: float = 0.1
    ) -> "ChainDenoiser":
        """The chain of an order from texts, which may begin anywhere in a sentence.

        Args:
            tokens_NL: ids in [0, V); rows of at least ``order + 1`` tokens.
            order: 1, 2 or 3: how many tokens the next one depends on.
            smoothing: added to every count, at least 0. A history that was never seen is followed
                by each token alike.

        Raises:
            ValueError: an argument outside its range.
        """
        if order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {order}")
        if not 0 <= smoothing < torch.inf:
            raise ValueError(f"smoothing must be finite and at least 0, got {smoothing}")
        if tokens_NL.ndim != 2 or tokens_NL.shape[1] <= order or not len(tokens_NL):
            raise ValueError(f"texts must be rows of more than {order} tokens")
        tokens_NL = token_ids(tokens_NL, table_VD)
        tokens = len(table_VD)
        grams_N = tokens_NL.unfold(1, order + 1, 1).reshape(-1, order + 1)
        index_N = torch.zeros_like(grams_N[:, 0])
        for column_N in grams_N.T:
            index_N = index_N * tokens + column_N
        counts = torch.bincount(index_N, minlength=tokens ** (order + 1)).double() + smoothing
        counts = counts.view((tokens,) * (order + 1))
        seen = counts.sum(-1, keepdim=True)
        transition = torch.where(seen > 0, counts / seen, 1 / tokens)
        return cls(table_VD, seen.squeeze(-1) / seen.sum(), transition)

    def log_prob(self, tokens_BL: Tensor) -> Tensor:
        tokens_BL = token_ids(tokens_BL, self.table_VD)
        first = self._first(tokens_BL.shape[1])
        total_B = first[tuple(tokens_BL[:, : first.ndim].T)]
        if tokens_BL.shape[1] > self.order:
            grams_BNK = tokens_BL.unfold(1, self.order + 1, 1)
            transition = self.transition_VRV.view((len(self.table_VD),) * (self.order + 1))
            total_B = total_B + transition[tuple(grams_BNK.unbind(-1))].sum(1)
        return total_B

    def draw(self, rows: int, length: int, seed: int) -> Tensor:
        return self.drawn_by(torch.Generator(self.table_VD.device).manual_seed(seed), rows, length)

    def drawn_by(self, generator: torch.Generator, rows: int, length: int) -> Tensor:
        """`draw`, by a generator on the table's device."""
        first, tokens = self._first(length), len(self.table_VD)
        history_B = torch.multinomial(
            first.exp().flatten(), rows, replacement=True, generator=generator
        )
        digits = [history_B // tokens**i % tokens for i in reversed(range(first.ndim))]
        while len(digits) < length:
            probs_SV = self.probs_VRV.view(-1, tokens)
            next_B = torch.multinomial(probs_SV[history_B], 1, generator=generator).squeeze(1)
            history_B = (history_B * tokens + next_B) % tokens**self.order
            digits.append(next_B)
        return torch.stack(digits, dim=1)

    def _first(self, length: int) -> Tensor:
        """Log-probabilities of the first K tokens, or of all of a shorter text."""
        spare = tuple(range(length, self.order))
        return self.initial.logsumexp(spare) if spare else self.initial

    def marginals(self, evidence_BLV: Tensor) -> tuple[Tensor, Tensor]:
        length, tokens = evidence_BLV.shape[1:]
        each = tokens**self.order * max(length, tokens)
        rows = max(1, MOST_ELEMENTS // each)
        parts = [self._messages(chunk) for chunk in torch.split(evidence_BLV, rows)]
        joint_BLV, total_B = (torch.cat(column) for column in zip(*parts, strict=True))
        return joint_BLV.log_softmax(-1), total_B

    def _messages(self, evidence_BLV: Tensor) -> tuple[Tensor, Tensor]:
        """``log p(s_i, everything known)`` ``[B, L, V]`` and ``log p(everything known)``."""
        rows, length, tokens = evidence_BLV.shape
        first = self._first(length)
        start = first.expand(rows, *first.shape)
        for i in range(first.ndim):
            shape = [rows] + [1] * first.ndim
            shape[1 + i] = tokens
            start = start + evidence_BLV[:, i].view(shape)
        histories = first.numel() // tokens  # R, given: an empty batch does not tell it
        ahead = [start.reshape(rows, tokens, histories)]
        for i in range(first.ndim, length):
            history_BRV = self._next(ahead[-1]) + evidence_BLV[:, i, None]
            # From here on its first token stands apart from the rest.
            ahead.append(history_BRV.reshape(rows, tokens, histories))
        behind_BVR = torch.zeros_like(ahead[-1])
        joint = []
        for i, ahead_BVR in zip(reversed(range(first.ndim, length)), reversed(ahead), strict=False):
            both_BSV = (ahead_BVR + behind_BVR).reshape(rows, histories, tokens)
            joint.append(both_BSV.logsumexp(1))
            after_BRV = behind_BVR.reshape(rows, histories, tokens) + evidence_BLV[:, i, None]
            behind_BVR = self._before(after_BRV)
        both = (ahead[0] + behind_BVR).view(rows, *first.shape)
        for kept in reversed(range(first.ndim)):
            others = tuple(1 + i for i in range(first.ndim) if i != kept)
            joint.append(both.logsumexp(others) if others else both)
        return torch.stack(joint[::-1], dim=1), both.flatten(1).logsumexp(1)

    # Where every transition is possible, both sums are matrix products, which are faster than a
    # `logsumexp` over transitions. Terms far below the largest then vanish in float64, without
    # effect. Where some transition is impossible, the largest term may be multiplied by 0, and one
    # that has vanished may be the only one left: there the sums are taken in log space.

    def _next(self, ahead_BVR: Tensor) -> Tensor:
        """``log sum_v exp(ahead_vr) P(w | v, r)``, ``[B, R, V]``."""
        if not self.all_possible:
            return (ahead_BVR[..., None] + self.transition_VRV).logsumexp(1)
        top_B1R = ahead_BVR.amax(1, keepdim=True)
        sum_BRV = torch.einsum("bvr,vrw->brw", (ahead_BVR - top_B1R).exp(), self.probs_VRV)
        return sum_BRV.log() + top_B1R.transpose(1, 2)

    def _before(self, after_BRV: Tensor) -> Tensor:
        """``log sum_w P(w | v, r) exp(after_rw)``, ``[B, V, R]``."""
        if not self.all_possible:
            return (self.transition_VRV + after_BRV[:, None]).logsumexp(-1)
        top_BR1 = after_BRV.amax(2, keepdim=True)
        sum_BVR = torch.einsum("brw,vrw->bvr", (after_BRV - top_BR1).exp(), self.probs_VRV)
        return sum_BVR.log() + top_BR1.transpose(1, 2)


class ChainPosterior(Posterior):
    """Marginals that were computed all at once: a message passes every position anyway."""

    by_row = ("log_probs_BLV",)

    def __init__(self, state: State, table_VD: Tensor, log_probs_BLV: Tensor) -> None:
        super().__init__(state, table_VD)
        self.log_probs_BLV = log_probs_BLV

    def _log_probs_unrevealed(self, at_N: Tensor) -> Tensor:
        log_probs_NV = self.log_probs_BLV.flatten(0, 1)[at_N]
        return log_probs_NV.masked_fill(log_probs_NV < NEVER / 2, -torch.inf)


def log(probs: Tensor) -> Tensor:
    """Natural logarithms of probabilities, `NEVER` for 0."""
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log().masked_fill(probs == 0, NEVER)


def require_probabilities(name: str, probs: Tensor) -> None:
    """ValueError unless these are probabilities that sum to 1 along the last dimension."""
    if not ((probs >= 0).all() and ((probs.sum(-1) - 1).abs() < 1e-6).all()):
        raise ValueError(f"{name} must hold probabilities that sum to 1")
