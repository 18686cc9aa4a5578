"""What a path is told about time, and what it answers.

Shapes: B rows, L positions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dsl.noise import Draws, Stream
from dsl.posterior import Posterior
from dsl.state import State, send


def no_evaluation(state: State) -> Posterior:
    """The default of `Clock.evaluate`, for a clock without a denoiser: raises ValueError."""
    raise ValueError("this path evaluates other states, which only `dsl.sample` can answer")


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The time of a move: call ``call`` (from 0) of ``budget``, in equal steps from 0 to 1.

    ``evaluate`` gives the posterior of any other state than the one being moved. It costs one more
    call of the budget, so the clock's next call is two further.
    """

    call: int
    budget: int
    draws: Draws
    evaluate: Callable[[State], Posterior] = no_evaluation

    @property
    def now(self) -> float:
        return self.call / self.budget

    @property
    def next(self) -> float:
        return (self.call + 1) / self.budget

    @property
    def calls_left(self) -> int:
        """Calls that are left, this one included."""
        return self.budget - self.call

    def uniform_like(self, gamma_BL: Tensor) -> Tensor:
        """``[B, L]`` float64 uniforms for the path's own choices, keyed (seed, row, step)."""
        rows, length = gamma_BL.shape
        return send(self.draws.uniform(rows, length, Stream.PATH), gamma_BL.device)


class Path(Protocol):
    """A rule for the next SNR of every token.

    ``carry`` is whatever the path wants to remember between calls. After the last call of a
    budget every token is revealed by `dsl.sample`, whatever the path answered.
    """

    @property
    def finite_snr(self) -> bool:
        """Whether it takes tokens through finite SNR, or only between masked and revealed."""

    def init(self, state: State) -> Any:
        """The carry before the first call."""

    def target(
        self, state: State, posterior: Posterior, carry: Any, clock: Clock
    ) -> tuple[Tensor, Any]:
        """Next gamma ``[B, L]`` in [0, inf], and the next carry.

        A gamma on the CPU is best. `dsl.channel.transition` copies it there from a GPU, and has to
        wait until the GPU has done everything ordered before, such as the network.
        """


@runtime_checkable
class Steers(Protocol):
    """A path that replaces the posterior mean as the drift of its moves to finite SNR."""

    def steer(self, posterior: Posterior, carry: Any) -> Posterior:
        """The posterior to move by, given the carry that `target` has just answered."""


@runtime_checkable
class Reports(Protocol):
    """A path with results of its own, recorded when a sample is finished."""

    def report(self, carry: Any) -> Mapping[str, Any]:
        """Entries for `Sample.recorded`, given the last carry."""
