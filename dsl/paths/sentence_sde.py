"""One SNR grid for all tokens of a sentence (003 algorithm 2).

Shapes: B rows, L positions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from dsl.paths.clock import Clock
from dsl.posterior import Posterior
from dsl.state import State

# SNR at a share of the way in [0, 1], for a given gamma_max; from 0 to gamma_max, increasing.
GRIDS: Mapping[str, Callable[[float, float], float]] = MappingProxyType(
    {
        "linear": lambda share, gamma_max: share * gamma_max,
        # Equal steps of log(1 + gamma): as linear below SNR 1, geometric above it.
        "log": lambda share, gamma_max: (1 + gamma_max) ** share - 1,
    }
)


@dataclass(frozen=True, kw_only=True)
class SentenceSDE:
    """Raise every token to the grid's next SNR; the last call of the budget reveals.

    A budget of T calls makes T - 1 moves, from 0 to ``gamma_max``. Tokens that know more than
    the grid asks for (prompts, soft evidence) wait where they are until it has caught up.
    """

    gamma_max: float
    grid: Literal["linear", "log"] = "linear"
    kind: Literal["sentence_sde"] = "sentence_sde"

    def __post_init__(self) -> None:
        if not 0 < self.gamma_max < float("inf"):
            raise ValueError(f"gamma_max must be positive and finite, got {self.gamma_max}")

    def init(self, state: State) -> None:
        return None

    def target(
        self, state: State, posterior: Posterior, carry: None, clock: Clock
    ) -> tuple[Tensor, None]:
        share = (clock.call + 1) / max(clock.budget - 1, 1)
        return state.gamma_BL.clamp_min(GRIDS[self.grid](min(share, 1.0), self.gamma_max)), None
