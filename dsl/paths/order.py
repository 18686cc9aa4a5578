"""One position after another, in a given order (random: ROAR; left to right: AR; 003 eq. 4).

Shapes: B rows, L positions.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dsl.errors import PathError
from dsl.paths.clock import Clock
from dsl.posterior import Posterior
from dsl.state import Knowledge, State


@dataclass(frozen=True)
class Order:
    """Reveal unrevealed tokens in ascending order of a key.

    ``order`` is ``"random"`` (every row its own), ``"left_to_right"``, or one key per position.
    A budget below the number of tokens reveals ``ceil(left / calls left)`` of them each call, so
    the last call has no more to guess at once than the others.

    Raises:
        ValueError: ``order`` has no such name, or a key is not finite.
    """

    order: Literal["random", "left_to_right"] | tuple[float, ...]
    kind: Literal["order"] = "order"

    finite_snr: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.order, str) and self.order not in ("random", "left_to_right"):
            raise ValueError(
                f"order must be 'random', 'left_to_right' or one key per position, "
                f"got {self.order!r}"
            )
        if not isinstance(self.order, str) and not all(map(math.isfinite, self.order)):
            raise ValueError(f"the keys of an order must be finite, got {self.order}")

    def init(self, state: State) -> None:
        return None

    def target(
        self, state: State, posterior: Posterior, carry: Tensor | None, clock: Clock
    ) -> tuple[Tensor, Tensor]:
        # Drawn at the first call, because only a clock brings keyed randomness.
        key_BL = self._keys(state.host.gamma_BL, clock) if carry is None else carry
        return reveal_first(state.host, key_BL, quota(state.host, clock)), key_BL

    def _keys(self, gamma_BL: Tensor, clock: Clock) -> Tensor:
        if self.order == "random":
            return clock.uniform_like(gamma_BL)
        length = gamma_BL.shape[1]
        keys = range(length) if self.order == "left_to_right" else self.order
        if len(keys) != length:
            raise PathError(f"order has {len(keys)} keys but the text has {length} positions")
        return torch.tensor(list(keys), dtype=torch.float64).expand_as(gamma_BL)


def open_BL(state: Knowledge) -> Tensor:
    """True where a token is still to be revealed."""
    return ~state.revealed_BL & ~state.frozen_BL


def quota(state: Knowledge, clock: Clock) -> Tensor:
    """How many tokens each row must reveal now for an even load to the end, int64 ``[B]``."""
    left_B = open_BL(state).sum(1)
    return -(-left_B // clock.calls_left)


def reveal_first(state: Knowledge, key_BL: Tensor, count_B: Tensor) -> Tensor:
    """Next gamma with the ``count_B`` open tokens of lowest key revealed; ties go left to right."""
    rank_BL = ranks(state, key_BL)
    return state.gamma_BL.masked_fill(open_BL(state) & (rank_BL < count_B[:, None]), torch.inf)


def ranks(state: Knowledge, key_BL: Tensor) -> Tensor:
    """Rank from 0 of every open token among its row's open tokens; closed ones come last."""
    key_BL = key_BL.masked_fill(~open_BL(state), torch.inf)
    return key_BL.argsort(dim=1, stable=True).argsort(dim=1)
