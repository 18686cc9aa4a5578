"""What a path is told about time, and what it answers.

Shapes: B rows, L positions.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dsl.noise import Draws, Stream
from dsl.posterior import Posterior
from dsl.state import State


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Call ``call`` (from 0) of ``budget``; time runs from 0 to 1 in equal steps."""

    call: int
    budget: int
    draws: Draws

    @property
    def now(self) -> float:
        return self.call / self.budget

    @property
    def next(self) -> float:
        return (self.call + 1) / self.budget

    def uniform_like(self, gamma_BL: Tensor) -> Tensor:
        """``[B, L]`` float64 uniforms for the path's own choices, keyed (seed, row, step)."""
        rows, length = gamma_BL.shape
        return self.draws.uniform(rows, length, Stream.PATH).to(gamma_BL.device)


class Path(Protocol):
    """A rule for the next SNR of every token.

    ``carry`` is whatever the path wants to remember between calls. After the last call of a
    budget every token is revealed by `dsl.sample`, whatever the path answered.
    """

    def init(self, state: State) -> Any:
        """The carry before the first call."""

    def target(
        self, state: State, posterior: Posterior, carry: Any, clock: Clock
    ) -> tuple[Tensor, Any]:
        """Next gamma ``[B, L]`` in [0, inf], and the next carry."""
