"""One position after another, and as many at once as their entropy allows.

Shapes: B rows, L positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dsl.paths import Clock, EntropyBounded, Order
from dsl.posterior import Posterior
from dsl.sampling import Sample, sample
from dsl.state import State
from tests.dsl.laws import cyclic, random_law

LAW = random_law(tokens=3, length=5, dim=2, seed=3)


@dataclass
class Reveals:
    """At which call each token was revealed, ``[B, L]``."""

    name: str = "reveals"
    call_BL: Tensor = field(default_factory=lambda: torch.zeros(0))

    def observe(self, clock: Clock, before: State, posterior: Posterior, after: State) -> None:
        if clock.call == 0:
            self.call_BL = torch.full_like(before.gamma_BL, -1)
        self.call_BL[after.revealed_BL & ~before.revealed_BL] = clock.call

    def result(self) -> Tensor:
        return self.call_BL


def draw(path: Any, budget: int, law: Any = LAW, state: State | None = None) -> Sample:
    length = law.sequences_SL.shape[1]
    state = State.masked(200, length, 2) if state is None else state
    return sample(law.denoiser(), path, state, budget=budget, seed=1, recorders=[Reveals()])


def test_left_to_right() -> None:
    call_BL = draw(Order("left_to_right"), 5).recorded["reveals"]
    assert (call_BL == torch.arange(5)).all()


def test_any_key_is_an_order() -> None:
    call_BL = draw(Order((0.5, -1.0, 9.0, 2.0, 3.0)), 5).recorded["reveals"]
    assert (call_BL == torch.tensor([1, 0, 4, 2, 3])).all()
    with pytest.raises(ValueError, match="3 keys but the text has 5"):
        draw(Order((0, 1, 2)), 5)
    with pytest.raises(ValueError, match="'sideways'"):
        Order("sideways")  # type: ignore[arg-type]
    for key in (math.inf, math.nan):
        with pytest.raises(ValueError, match="keys of an order must be finite"):
            Order((0.5, key))


def test_random_orders_are_uniform_and_each_row_has_its_own() -> None:
    call_BL = draw(Order("random"), 5).recorded["reveals"]
    assert (call_BL.sort(dim=1).values == torch.arange(5)).all()
    first_L = (call_BL == 0).sum(0)
    assert ((first_L - 40).abs() < 5 * (200 * 0.2 * 0.8) ** 0.5).all()


@pytest.mark.parametrize(("budget", "sizes"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1])])
def test_a_short_budget_is_spread_evenly(budget: int, sizes: list[int]) -> None:
    call_BL = draw(Order("random"), budget).recorded["reveals"]
    for call, size in enumerate(sizes):
        assert ((call_BL == call).sum(1) == size).all()


def test_a_long_budget_stops_when_the_text_is_done() -> None:
    made = draw(Order("random"), 50)
    assert made.calls == 5
    assert torch.equal(made.tokens_BL, draw(Order("random"), 5).tokens_BL)


@pytest.mark.parametrize("path", [Order("random"), EntropyBounded(bound=0.0)], ids=repr)
def test_known_tokens_take_no_turn(path: Any) -> None:
    known_BL = torch.tensor([True, False, True, False, False]).expand(200, 5)
    start = State.from_tokens(LAW.table_VD, LAW.draw(200, seed=0), known_BL)
    made = draw(path, 3, state=start)
    assert made.calls == 3
    assert torch.equal(made.tokens_BL[known_BL], start.tokens_BL[known_BL])
    assert (made.recorded["reveals"].max(1).values == 2).all()


def test_masks_may_be_transposed() -> None:
    known_BL = torch.arange(5).expand(9, 5) < 2
    texts = LAW.draw(9, seed=0)
    across, expected = (
        draw(EntropyBounded(bound=0.3), 3, state=State.from_tokens(LAW.table_VD, texts, known))
        for known in (known_BL.T.contiguous().T, known_BL.contiguous())
    )
    assert torch.equal(across.tokens_BL, expected.tokens_BL)


def test_the_largest_set_within_the_bound_is_revealed() -> None:
    """Against every subset: the surest k with sum less maximum within the bound, never k + 1."""
    state = State.masked(1, 5, 2)
    posterior = LAW.denoiser()(state.like(LAW.table_VD))
    entropy_L = posterior.entropy_at(torch.arange(5)).sort().values
    for bound in (0.0, 0.4, 1.0, 1.9, 2.8, 9.0):
        path = EntropyBounded(bound=bound)
        clock = Clock(call=0, budget=5, draws=None)  # type: ignore[arg-type]
        gamma_BL, _ = path.target(state.like(LAW.table_VD), posterior, None, clock)
        count = int(gamma_BL.isinf().sum())
        assert count >= 1
        if count > 1:
            assert entropy_L[: count - 1].sum() <= bound
        if count < 5:
            assert entropy_L[:count].sum() > bound


def test_certain_tokens_come_together() -> None:
    """One token of a cyclic text says the rest: two calls, whatever the budget."""
    law = cyclic(7)
    made = draw(EntropyBounded(bound=0.1), 7, law)
    assert made.calls == 2
    assert (law.index(made.tokens_BL) < 7).all()


def test_a_bound_that_is_too_tight_still_ends_in_time() -> None:
    made = draw(EntropyBounded(bound=0.0), 2)
    call_BL = made.recorded["reveals"]
    assert made.calls == 2
    assert ((call_BL == 0).sum(1) == 3).all()
    with pytest.raises(ValueError, match="bound"):
        EntropyBounded(bound=-1.0)
