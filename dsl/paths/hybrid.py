"""Two paths in a row: soft evidence first, endpoint commitment after (000 §4.8).

Shapes: B rows, L positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from dsl.errors import PathError
from dsl.paths.clock import Clock, Reports, Steers
from dsl.paths.entropy_bounded import EntropyBounded
from dsl.paths.masked import Masked
from dsl.paths.order import Order
from dsl.paths.remask import Remask
from dsl.paths.second_order import SecondOrder
from dsl.paths.sentence_sde import SentenceSDE
from dsl.paths.token_sde import TokenSDE
from dsl.posterior import Posterior
from dsl.state import State

# The paths that can be one stage of a longer one.
Stage = Masked | Remask | Order | EntropyBounded | SentenceSDE | TokenSDE | SecondOrder


class HybridCarry(NamedTuple):
    """The stage in charge, what it remembers, and what the stage before it reported."""

    second: bool
    stage: Any
    reported: Mapping[str, Any]


@dataclass(frozen=True)
class Hybrid:
    """``split = (T_cont, T_MDM)`` calls of ``first``, then of ``second``.

    The budget is their sum. Every call of the first stage is a move. The reveal with which the
    stage would end alone is left to the second, which starts from the evidence that it finds. A
    split of (T, 0) is the first path itself, (0, T) the second. A number that both stages report,
    such as their shortfall, is summed.

    Raises:
        ValueError: a stage that is no `Stage`; or a split that is not two counts, or is (0, 0).
    """

    first: Stage
    second: Stage
    split: tuple[int, int]
    kind: Literal["hybrid"] = "hybrid"

    def __post_init__(self) -> None:
        for stage in (self.first, self.second):
            if not isinstance(stage, Stage):
                raise ValueError(
                    f"the stages of a Hybrid must be paths other than Hybrid, got {stage!r}"
                )
        counts = [type(calls) for calls in self.split] == [int, int]
        if not counts or min(self.split) < 0 or sum(self.split) == 0:
            raise ValueError(f"split must be two counts of calls, not both 0, got {self.split}")

    @property
    def stages(self) -> list[Stage]:
        """The stages that get calls, in order."""
        both = zip((self.first, self.second), self.split, strict=True)
        return [stage for stage, calls in both if calls]

    @property
    def finite_snr(self) -> bool:
        return any(stage.finite_snr for stage in self.stages)

    def init(self, state: State) -> HybridCarry:
        second = self.split[0] == 0
        return HybridCarry(second, self._stage(second).init(state), {})

    def target(
        self, state: State, posterior: Posterior, carry: HybridCarry, clock: Clock
    ) -> tuple[Tensor, HybridCarry]:
        before, after = self.split
        if clock.budget != before + after:
            raise PathError(
                f"Hybrid splits {before} + {after} calls but the budget is {clock.budget}; "
                "make them equal"
            )
        if clock.call >= before and not carry.second:
            carry = HybridCarry(True, self.second.init(state), self.report(carry))
        if carry.second:
            clock = replace(clock, call=clock.call - before, budget=after)
        else:
            # One call more than it gets: it would reveal in that last call, which is never made.
            clock = replace(clock, budget=before + (after > 0))
        # mypy cannot know that the carry belongs to the stage.
        stage: Any = self._stage(carry.second)
        gamma_BL, stage_carry = stage.target(state, posterior, carry.stage, clock)
        return gamma_BL, carry._replace(stage=stage_carry)

    def steer(self, posterior: Posterior, carry: HybridCarry) -> Posterior:
        stage = self._stage(carry.second)
        return stage.steer(posterior, carry.stage) if isinstance(stage, Steers) else posterior

    def report(self, carry: HybridCarry) -> Mapping[str, Any]:
        stage = self._stage(carry.second)
        own = stage.report(carry.stage) if isinstance(stage, Reports) else {}
        # What both stages report is summed.
        before = carry.reported
        summed = {key: before[key] + value for key, value in own.items() if key in before}
        return {**before, **own, **summed}

    def _stage(self, second: bool) -> Stage:
        return self.second if second else self.first
