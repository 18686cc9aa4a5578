"""What holds for every path, state and budget.

Shapes: B rows, L positions.
"""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsl.noise import Draws
from dsl.paths import (
    AnyPath,
    Clock,
    Hybrid,
    Masked,
    Order,
    Remask,
    SentenceSDE,
    TokenSDE,
)
from dsl.recorders import Schedule
from dsl.sampling import sample
from dsl.state import State
from tests.dsl.walks import CONTINUOUS, HYBRIDS, LAW, PATHS, SDE, states


class Finite:
    """Every state on the way is finite, reads as it should and keeps what is frozen."""

    name = "finite"

    def __init__(self) -> None:
        self.states = 0

    def observe(self, clock: Clock, before: State, posterior: Any, after: State) -> None:
        for state in (before, after):
            assert state.z_BLD.isfinite().all()
            assert (state.gamma_BL >= 0).all()
            assert (state.z_BLD[state.masked_BL] == 0).all()
            assert (state.z_BLD[state.revealed_BL] == 0).all()
        frozen_BL = before.frozen_BL
        assert torch.equal(before.tokens_BL[frozen_BL], after.tokens_BL[frozen_BL])
        assert torch.equal(before.gamma_BL[frozen_BL], after.gamma_BL[frozen_BL])
        self.states += 1

    def result(self) -> int:
        return self.states


class Seen(Finite):
    """Whether any state on the way holds evidence at finite SNR."""

    name = "seen"
    evidence = False

    def observe(self, clock: Clock, before: State, posterior: Any, after: State) -> None:
        self.evidence |= bool(after.evidence_BL.any())

    def result(self) -> bool:
        return self.evidence


def check(path: AnyPath, state: State, budget: int, seed: int) -> None:
    made = sample(LAW.denoiser(), path, state, budget=budget, seed=seed, recorders=[Finite()])
    assert made.calls <= budget
    assert (made.row_calls_B <= made.calls).all()
    assert ((made.tokens_BL >= 0) & (made.tokens_BL < 3)).all()
    known_BL = state.frozen_BL
    assert torch.equal(made.tokens_BL[known_BL], state.tokens_BL[known_BL])


@settings(max_examples=150)
@given(path=st.sampled_from(PATHS), state=states, budget=st.integers(1, 12), seed=st.integers(0, 9))
def test_any_state_any_budget(path: AnyPath, state: State, budget: int, seed: int) -> None:
    check(path, state, budget, seed)


@settings(max_examples=80)
@given(
    stages=st.sampled_from(HYBRIDS),
    split=st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(any),
    state=states,
)
def test_any_hybrid(stages: Any, split: tuple[int, int], state: State) -> None:
    check(Hybrid(*stages, split=split), state, sum(split), 0)


ONE_EACH = Order("left_to_right")  # a call of at most L reveals something
HIGHER: list[AnyPath] = [  # their first move is beyond what a first stage of SNR 20 leaves
    SentenceSDE(gamma_max=400.0),
    TokenSDE(gamma_max=400.0, delta=50.0),
    TokenSDE(gamma_max=400.0, delta=50.0, curvature="jvp"),
]


@settings(max_examples=300)
@given(
    stages=st.tuples(st.sampled_from(CONTINUOUS), st.sampled_from([ONE_EACH, *HIGHER]))
    | st.tuples(st.just(ONE_EACH), st.sampled_from(CONTINUOUS)),
    split=st.tuples(st.integers(0, 17), st.integers(0, 17)),
)
def test_a_path_that_never_waits_makes_all_of_its_calls(
    stages: Any, split: tuple[int, int]
) -> None:
    """Whatever a curvature costs: no call of the budget is lost, at the seam of two stages least
    of all. (An order reveals a token a call, so it is given at most as many calls as tokens.)"""
    most = (3 if stages[0] == ONE_EACH else 17, 4 if stages[1] == ONE_EACH else 17)
    first, second = min(split[0], most[0]), min(split[1], most[1])
    budget = first + second
    assume(budget > 0)
    path = Hybrid(*stages, split=(first, second))
    made = sample(LAW.denoiser(), path, State.masked(3, 4, 2), budget=budget, seed=0)
    assert made.calls == budget
    assert (made.row_calls_B == budget).all()


@pytest.mark.parametrize("path", [p for p in PATHS if p not in CONTINUOUS], ids=repr)
def test_an_endpoint_path_makes_a_call_for_every_step_that_reveals(path: AnyPath) -> None:
    recorder = Schedule()
    made = sample(
        LAW.denoiser(), path, State.masked(1, 4, 2), budget=12, seed=3, recorders=[recorder]
    )
    assert made.calls == sum(share > 0 for share in recorder.result()["reveals"])


@pytest.mark.parametrize(
    "path",
    [*PATHS, *(Hybrid(*pair, split=n) for pair in HYBRIDS for n in ((3, 6), (0, 9), (9, 0)))],
    ids=repr,
)
def test_a_path_says_whether_it_passes_through_finite_snr(path: AnyPath) -> None:
    made = sample(
        LAW.denoiser(), path, State.masked(16, 4, 2), budget=9, seed=1, recorders=[Seen()]
    )
    assert made.recorded["seen"] is path.finite_snr


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_split_that_leaves_one_stage_out_is_the_other(path: AnyPath) -> None:
    start = State.masked(16, 4, 2)
    whole = sample(LAW.denoiser(), path, start, budget=9, seed=1)
    for hybrid in (
        Hybrid(path, Masked(), split=(9, 0)),  # type: ignore[arg-type]
        Hybrid(Masked(), path, split=(0, 9)),  # type: ignore[arg-type]
    ):
        made = sample(LAW.denoiser(), hybrid, start, budget=9, seed=1)
        assert torch.equal(made.tokens_BL, whole.tokens_BL)
        assert made.calls == whole.calls


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_text_does_not_depend_on_the_batch(path: AnyPath) -> None:
    made = [
        sample(LAW.denoiser(), path, State.masked(rows, 4, 2), budget=9, seed=1, first_row=first)
        for rows, first in ((8, 0), (4, 4), (1, 6))
    ]
    assert torch.equal(made[0].tokens_BL[4:], made[1].tokens_BL)
    assert torch.equal(made[0].tokens_BL[6:7], made[2].tokens_BL)
    if path != Remask(rule="conf"):  # which reads the posterior of rows that did not need one
        assert torch.equal(made[0].row_calls_B[4:], made[1].row_calls_B)


def test_a_second_stage_finds_the_evidence_as_it_was_left() -> None:
    path = Hybrid(SDE, Order("left_to_right"), split=(3, 4))
    denoiser = LAW.denoiser()
    state, carry = State.masked(5, 4, 2).like(LAW.table_VD), path.init(State.masked(5, 4, 2))
    for call in range(3, 7):
        clock = Clock(call=call, budget=7, draws=Draws(0, 0, call))
        state = State.from_tokens(
            LAW.table_VD, LAW.draw(5, 0), torch.zeros(5, 4).bool(), torch.full((5, 4), 7.0)
        )
        gamma_BL, carry = path.target(state, denoiser(state), carry, clock)
        assert set(gamma_BL.unique().tolist()) <= {7.0, float("inf")}


def test_every_path_of_the_union_is_covered_and_has_its_own_kind() -> None:
    members = get_args(AnyPath)
    assert {type(path) for path in PATHS} | {Hybrid} == set(members)
    kinds = [member.__dataclass_fields__["kind"].default for member in members]
    assert len(set(kinds)) == len(members)
    for path in PATHS:
        assert hash(path) == hash(path)
