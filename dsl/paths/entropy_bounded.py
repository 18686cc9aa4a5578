"""Reveal as many tokens as their joint uncertainty allows (arXiv 2505.24857).

Shapes: B rows, L positions.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dsl.paths.clock import Clock
from dsl.paths.order import open_BL, quota, reveal_first
from dsl.posterior import Posterior
from dsl.state import State, flat


@dataclass(frozen=True, kw_only=True)
class EntropyBounded:
    """Reveal the k surest tokens at each call, with the largest k that ``bound`` (in nats) allows.

    It bounds the sum of the k entropies without the largest of them. This sum is at least the total
    correlation, which is what drawing the tokens independently can lose against drawing them
    jointly. If the budget needs more, a row reveals ``ceil(left / calls left)`` all the same. With
    a bound of 0, uncertain tokens are revealed one per call, surest first. Rows that finish early
    cost no more calls.

    Raises:
        ValueError: ``bound`` is negative or NaN.
    """

    bound: float
    kind: Literal["entropy_bounded"] = "entropy_bounded"

    finite_snr: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.bound >= 0:
            raise ValueError(f"bound must be at least 0 nats, got {self.bound}")

    def init(self, state: State) -> None:
        return None

    def target(
        self, state: State, posterior: Posterior, carry: None, clock: Clock
    ) -> tuple[Tensor, None]:
        at_N = flat(open_BL(state.host))
        # Not full_like, which keeps the strides of a transposed gamma: it would have no flat view.
        entropy_BL = torch.full(state.gamma_BL.shape, torch.inf, dtype=torch.float64)
        entropy_BL.view(-1)[at_N] = posterior.entropy_at(at_N).to(entropy_BL)
        sorted_BL = entropy_BL.sort(dim=1).values
        # Of the first k in ascending order the k-th is the largest: sum those before it.
        before_BL = sorted_BL.cumsum(1).roll(1, dims=1)
        before_BL[:, :1] = 0
        allowed_B = (before_BL <= self.bound).sum(1)
        allowed_B = allowed_B.maximum(quota(state.host, clock))
        return reveal_first(state.host, entropy_BL, allowed_B), None
