"""The answer of a denoiser, computed only at the positions asked for.

Give asked positions on the CPU. They decide the shapes of what follows, so the CPU has to read
them, and would wait for a GPU to copy them back.

Shapes: B rows, L positions, V tokens, D table dimension, N asked positions (flat, in [0, B·L)),
R rows.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dsl.chunks import spans
from dsl.state import State, flat, send


class Posterior(ABC):
    """``p(s_i | state)`` for every position of a batch, over the V real tokens.

    At revealed positions it is one-hot (the token is known); everywhere else subclasses say, for
    just the positions asked for. Nothing of size B·L·V exists unless `log_probs` is called.
    ``by_row`` names the attributes that `with_rows` merges: tensors ``[B, ...]`` and posteriors.
    """

    by_row: ClassVar[tuple[str, ...]]

    def __init__(self, state: State, table_VD: Tensor) -> None:
        self.state = state
        self.table_VD = table_VD

    @abstractmethod
    def _log_probs_unrevealed(self, at_N: Tensor) -> Tensor:
        """Normalised ``[N, V]`` log-probabilities at unrevealed positions; ``at_N`` is on the
        table's device."""

    def _scores_unrevealed(self, at_N: Tensor) -> Tensor:
        """As `_log_probs_unrevealed`, but each row may be off by a constant."""
        return self._log_probs_unrevealed(at_N)

    def _probs_unrevealed(self, at_N: Tensor) -> Tensor:
        """As `_log_probs_unrevealed`, but probabilities ``[N, V]``."""
        return self._log_probs_unrevealed(at_N).exp()

    def with_rows(self, state: State, rows_R: Tensor, fresh: "Posterior") -> "Posterior":
        """The posterior of ``state``: its rows ``rows_R`` from ``fresh``, which has R rows, and all
        other rows from this posterior. ``rows_R`` lie on the table's device."""
        merged = copy.copy(self)
        merged.state = state
        for name in self.by_row:
            own, new = getattr(self, name), getattr(fresh, name)
            if isinstance(own, Posterior):
                setattr(merged, name, own.with_rows(state, rows_R, new))
            elif own is not None:
                setattr(merged, name, own.index_copy(0, rows_R, new))
        return merged

    def log_probs_at(self, at_N: Tensor) -> Tensor:
        """``[N, V]`` log-probabilities at flat positions ``at_N``."""
        found_NV = self._log_probs_unrevealed(self._sent(at_N))
        return self._carried_over(found_NV, at_N, other=-torch.inf, own=0.0)

    def probs_at(self, at_N: Tensor) -> Tensor:
        """``[N, V]`` probabilities at flat positions ``at_N``."""
        found_NV = self._probs_unrevealed(self._sent(at_N))
        return self._carried_over(found_NV, at_N, other=0.0, own=1.0)

    def mean_at(self, at_N: Tensor) -> Tensor:
        """``[N, D]`` posterior mean ``x_hat = E[x | state]`` (003 eq. 2) at flat positions."""
        # The product runs in the table's dtype: a float64 law keeps its precision.
        mean_ND = self.table_VD.new_empty(len(at_N), self.table_VD.shape[1])
        for span in self._spans(len(at_N)):
            mean_ND[span] = self.probs_at(at_N[span]).to(self.table_VD) @ self.table_VD
        return mean_ND

    def draw(self, at_N: Tensor, uniform_N: Tensor) -> Tensor:
        """Tokens ``[N]`` drawn at flat positions, one uniform in [0, 1) each.

        Inverse CDF in float64: float32 Gumbel draws lower the temperature (arXiv 2409.02908).
        """
        tokens_N = torch.empty_like(at_N, device=self.table_VD.device)
        uniform_N = self._sent(uniform_N)
        for span in self._spans(len(at_N)):
            cdf_NV = self.log_probs_at(at_N[span]).to(torch.float64, copy=True).exp_().cumsum(-1)
            # The last entry is 1 up to rounding; scaling by it keeps the draw inside the support.
            threshold_N1 = (uniform_N[span].to(cdf_NV) * cdf_NV[:, -1])[:, None]
            tokens_N[span] = torch.searchsorted(cdf_NV, threshold_N1, right=True).squeeze(1)
        return tokens_N.clamp_max_(len(self.table_VD) - 1)

    def entropy_at(self, at_N: Tensor) -> Tensor:
        """Entropy ``[N]`` in nats at flat positions; 0 where revealed."""
        entropy_N = self.table_VD.new_empty(len(at_N))
        for span in self._spans(len(at_N)):
            entropy_N[span] = torch.special.entr(self.probs_at(at_N[span])).sum(-1)
        return entropy_N

    def confidence_at(self, at_N: Tensor, tokens_N: Tensor) -> Tensor:
        """Probability ``[N]`` of a token at each flat position, be it revealed or not.

        Unlike in `log_probs`, a revealed token is not taken as certain. Its probability is what the
        network, or the exact law, computes there before the known token replaces the answer.
        """
        confidence_N = self.table_VD.new_empty(len(at_N))
        for span in self._spans(len(at_N)):
            log_probs_NV = self._log_probs_unrevealed(self._sent(at_N[span]))
            confidence_N[span] = log_probs_NV.gather(1, tokens_N[span, None]).squeeze(1).exp()
        return confidence_N

    def summarise(self, function: Callable[..., Tensor], at_N: Tensor, *with_N: Tensor) -> Tensor:
        """``function(log_probs_NV, *with_N)`` at flat positions ``at_N``, a chunk at a time.

        Anything in ``with_N`` is cut along with the positions. What the function answers for the
        chunks is joined along its first dimension: positions x vocabulary is never held at once.
        """
        answers = []
        # At least one chunk: the answer for no positions has a dtype and a device too.
        for span in self._spans(max(len(at_N), 1)):
            at, *rest = (column_N[span] for column_N in (at_N, *with_N))
            answers.append(function(self.log_probs_at(at), *rest))
        return torch.cat(answers)

    def log_probs(self) -> Tensor:
        """``[B, L, V]`` log-probabilities, normalised over the V real tokens."""
        rows, length = self.state.gamma_BL.shape
        found_NV = self.log_probs_at(torch.arange(rows * length))
        return found_NV.view(rows, length, len(self.table_VD))

    def mean(self) -> Tensor:
        """``[B, L, D]`` posterior mean; the token's own row where it is revealed."""
        own_BLD = self.table_VD[self.state.tokens_BL]
        at_N = flat(~self.state.host.revealed_BL)
        mean_BLD = own_BLD.flatten(0, 1).index_copy(0, self._sent(at_N), self.mean_at(at_N))
        return mean_BLD.view_as(own_BLD)

    def _carried_over(self, found_NV: Tensor, at_N: Tensor, *, other: float, own: float) -> Tensor:
        """``found_NV``, but ``own`` at the known token of a revealed position and ``other`` at the
        rest of that row."""
        at_N = at_N.cpu()
        known_N = flat(self.state.host.revealed_BL.flatten()[at_N])
        if len(known_N) == 0:
            return found_NV
        tokens_N1 = self.state.tokens_BL.flatten()[self._sent(at_N[known_N])][:, None]
        known_NV = found_NV.new_full((len(tokens_N1), found_NV.shape[1]), other)
        return found_NV.index_copy(0, self._sent(known_N), known_NV.scatter(1, tokens_N1, own))

    def _spans(self, positions: int) -> list[slice]:
        return spans(positions, len(self.table_VD), self.table_VD.device)

    def _sent(self, tensor: Tensor) -> Tensor:
        return send(tensor, self.table_VD.device)


class Denoises(Protocol):
    """Anything that answers a state with a posterior: a network, or the exact law."""

    @property
    def table_VD(self) -> Tensor:
        """Unit rows ``[V, D]``."""

    def __call__(self, state: State) -> Posterior:
        """The posterior of every token given the state, and nothing else (003 A.1)."""
