"""One SNR grid for all tokens of a sentence (003 algorithm 2).

Shapes: B rows, L positions.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from dsl.paths.clock import Clock
from dsl.paths.grids import LINEAR, Grid, named
from dsl.posterior import Posterior
from dsl.state import State


@dataclass(frozen=True, kw_only=True)
class SentenceSDE:
    """Raise every token to the grid's next SNR; the last call of the budget reveals.

    A budget of T calls makes T - 1 moves, from 0 to ``gamma_max``. Tokens with a higher SNR
    than the grid's (prompts, soft evidence) stay where they are until the grid reaches it.
    A grid that has no settings may be given by its name.

    Raises:
        ValueError: ``gamma_max`` is not positive and finite, or does not fit the grid.
    """

    gamma_max: float
    grid: Grid | Literal["linear", "log"] = LINEAR
    kind: Literal["sentence_sde"] = "sentence_sde"

    finite_snr: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.gamma_max < float("inf"):
            raise ValueError(f"gamma_max must be positive and finite, got {self.gamma_max}")
        # So that a grid that does not fit raises now, not in the middle of a sample.
        self.gamma(1.0)

    def gamma(self, share: float) -> float:
        """SNR after a share of the moves."""
        return named(self.grid).gamma(share, self.gamma_max)

    def init(self, state: State) -> None:
        return None

    def target(
        self, state: State, posterior: Posterior, carry: None, clock: Clock
    ) -> tuple[Tensor, None]:
        share = (clock.call + 1) / max(clock.budget - 1, 1)
        return state.host.gamma_BL.clamp_min(self.gamma(min(share, 1.0))), None
