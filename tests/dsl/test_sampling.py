"""The loop: its budget, its counting, its independence of the batch, and the law it samples.

Shapes: B rows, L positions, V tokens, D table dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dsl.exact import ExactDenoiser
from dsl.paths import AnyPath, Clock, Hybrid, Masked, SecondOrder, SentenceSDE
from dsl.posterior import Posterior
from dsl.sampling import Sample, sample
from dsl.state import State
from tests.dsl.laws import (
    Law,
    law_p,
    random_law,
)

LAW = random_law(tokens=3, length=4, dim=2, seed=3)
PATHS: list[AnyPath] = [
    Masked(),
    Masked(alpha="cosine"),
    SentenceSDE(gamma_max=20.0),
    SentenceSDE(gamma_max=20.0, grid="log"),
    Hybrid(SentenceSDE(gamma_max=5.0), Masked(), split=(5, 7)),
]
BUDGET = 12


@dataclass
class Spy:
    """A denoiser that counts the rows of every call."""

    inner: ExactDenoiser
    rows: list[int] = field(default_factory=list)

    @property
    def table_VD(self) -> Tensor:
        return self.inner.table_VD

    def __call__(self, state: State) -> Posterior:
        assert not state.revealed_BL.all(1).any() or not self.rows, "a finished row costs a call"
        self.rows.append(len(state.gamma_BL))
        return self.inner(state)


def blank(law: Law, rows: int) -> State:
    return State.masked(rows, law.sequences_SL.shape[1], law.table_VD.shape[1])


def draw(path: AnyPath, rows: int = 8, budget: int = BUDGET, **kwargs: Any) -> Sample:
    return sample(LAW.denoiser(), path, blank(LAW, rows), budget=budget, seed=4, **kwargs)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_budget_is_kept_and_everything_ends_revealed(path: AnyPath) -> None:
    spy = Spy(LAW.denoiser())
    made = sample(spy, path, blank(LAW, 8), budget=BUDGET, seed=0)
    assert made.tokens_BL.shape == (8, 4)
    assert ((made.tokens_BL >= 0) & (made.tokens_BL < 3)).all()
    assert made.calls == len(spy.rows) <= BUDGET
    assert made.row_calls_B.sum() == sum(spy.rows)
    assert made.row_calls_B.max() <= made.calls
    assert made.row_calls_B.min() >= 1


def test_cached_rows_cost_nothing() -> None:
    """With many more calls than tokens most steps reveal nothing. A row is asked again only after
    one of its own tokens was revealed, and never once it is finished."""
    rows, length = 6, 4
    path, budget = Masked(), 200
    moved: list[Tensor] = []

    @dataclass
    class Moves:
        name: str = "moves"

        def observe(self, clock: Clock, before: State, posterior: Posterior, after: State) -> None:
            moved.append((before.gamma_BL != after.gamma_BL).any(1))

        def result(self) -> None:
            return None

    spy = Spy(LAW.denoiser())
    made = sample(spy, path, blank(LAW, rows), budget=budget, seed=2, recorders=[Moves()])
    assert torch.equal(made.row_calls_B, torch.stack(moved).sum(0))
    assert made.calls == len(spy.rows) <= rows * length
    assert sum(spy.rows) == made.row_calls_B.sum() <= rows * length
    assert made.row_calls_B.max() <= length


def test_a_finished_start_costs_no_call() -> None:
    tokens_BL = LAW.draw(3, seed=0)
    for known in (True, False):
        start = State.from_tokens(
            LAW.table_VD,
            tokens_BL,
            torch.full(tokens_BL.shape, known),
            torch.full(tokens_BL.shape, math.inf),
        )
        for path in PATHS:
            made = sample(LAW.denoiser(), path, start, budget=BUDGET, seed=0)
            assert torch.equal(made.tokens_BL, tokens_BL)
            assert made.calls == 0
            assert made.row_calls_B.tolist() == [0, 0, 0]


@dataclass
class Watch:
    """Every state that a sample passed through, and what the posterior said of it."""

    name: str = "watch"
    look: bool = False
    calls: list[int] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    answers: list[tuple[State, Tensor]] = field(default_factory=list)

    def observe(self, clock: Clock, before: State, posterior: Posterior, after: State) -> None:
        if self.states:
            assert before is self.states[-1]
        else:
            self.states.append(before)
        self.calls.append(clock.call)
        self.states.append(after)
        if self.look:
            self.answers.append((before, posterior.log_probs()))

    def result(self) -> int:
        return len(self.states)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_recorders_see_every_step_and_change_no_text(path: AnyPath) -> None:
    plain = draw(path)
    watch, looking = Watch(), Watch(name="looking", look=True)
    made = draw(path, recorders=[watch])
    assert watch.calls == list(range(BUDGET))
    assert made.recorded == {"watch": BUDGET + 1}
    assert torch.equal(made.tokens_BL, plain.tokens_BL)
    assert made.calls == plain.calls
    assert (watch.states[0].gamma_BL == 0).all()
    assert watch.states[-1].revealed_BL.all()
    assert torch.equal(watch.states[-1].tokens_BL, made.tokens_BL)

    curious = draw(path, recorders=[looking])
    assert torch.equal(curious.tokens_BL, plain.tokens_BL)
    assert plain.calls <= curious.calls <= BUDGET
    for before, log_probs_BLV in looking.answers:
        assert torch.equal(log_probs_BLV, LAW.denoiser()(before).log_probs())


@dataclass(frozen=True)
class Forgetful:
    """Hides everything at one call without looking at the posterior, then reveals at the last."""

    def init(self, state: State) -> None:
        return None

    def target(
        self, state: State, posterior: Posterior, carry: None, clock: Clock
    ) -> tuple[Tensor, None]:
        return torch.full_like(state.gamma_BL, 0.5), None


def test_a_recorder_may_be_the_only_one_to_look() -> None:
    """A move down needs no posterior; whoever looks still sees that of the state before it."""
    tokens_BL = LAW.draw(3, seed=0)
    start = State.from_tokens(
        LAW.table_VD,
        tokens_BL,
        torch.zeros(tokens_BL.shape).bool(),
        torch.tensor([[math.inf, math.inf, 3.0, 0.5]]).expand(3, -1),
    )
    looking = Watch(look=True)
    sample(LAW.denoiser(), Forgetful(), start, budget=3, seed=0, recorders=[looking])
    for before, log_probs_BLV in looking.answers:
        assert torch.equal(log_probs_BLV, LAW.denoiser()(before).log_probs())


def test_hybrid_moves_in_all_calls_of_its_first_stage() -> None:
    watch = Watch()
    draw(Hybrid(SentenceSDE(gamma_max=5.0), Masked(), split=(5, 7)), recorders=[watch])
    for call, state in enumerate(watch.states[1:6], start=1):
        assert (state.gamma_BL == call).all()  # 5 moves of SNR 1: up to gamma_max
    for before, after in zip(watch.states[5:], watch.states[6:], strict=False):
        soft_BL = ~after.revealed_BL
        assert (after.gamma_BL[soft_BL] == 5).all()
        assert torch.equal(after.z_BLD[soft_BL], before.z_BLD[soft_BL])


def test_soft_evidence_waits_for_the_grid() -> None:
    start = State.from_tokens(
        LAW.table_VD, LAW.draw(2, seed=0), torch.zeros(2, 4).bool(), torch.full((2, 4), 2.5)
    )
    watch = Watch()
    path = SentenceSDE(gamma_max=4.0)
    sample(LAW.denoiser(), path, start, budget=5, seed=0, recorders=[watch])
    visited = [state.gamma_BL[0, 0].item() for state in watch.states]
    assert visited == [2.5, 2.5, 2.5, 3.0, 4.0, math.inf]


def test_wrong_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one call"):
        draw(Masked(), budget=0)
    with pytest.raises(ValueError, match="a whole number"):  # the last reveal would never come
        draw(Masked(), budget=2.5)  # type: ignore[arg-type]
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed must lie in"):
            sample(LAW.denoiser(), Masked(), blank(LAW, 2), budget=2, seed=seed)
    with pytest.raises(ValueError, match="first_row must be at least 0"):
        sample(LAW.denoiser(), Masked(), blank(LAW, 2), budget=2, seed=0, first_row=-1)
    with pytest.raises(ValueError, match=r"5 \+ 7 calls but the budget is 11"):
        draw(PATHS[4], budget=11)
    for split in ((0, 0), (-1, 2), (1.5, 2.5), (1, 2, 3), (4,)):
        with pytest.raises(ValueError, match="split must be two counts of calls"):
            Hybrid(Masked(), Masked(), split=split)  # type: ignore[arg-type]
    for gamma_max in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="gamma_max"):
            SentenceSDE(gamma_max=gamma_max)


def test_a_path_of_paths_takes_those_that_it_can_walk() -> None:
    whole = Hybrid(Masked(), Masked(), split=(2, 2))
    for stages in ((whole, Masked()), (Masked(), whole), ("masked", Masked())):
        with pytest.raises(ValueError, match="stages of a Hybrid must be paths other than Hybrid"):
            Hybrid(*stages, split=(4, 2))  # type: ignore[arg-type]
    for inner in (Masked(), whole, SecondOrder(SentenceSDE(gamma_max=2.0))):
        with pytest.raises(ValueError, match="must be a SentenceSDE or a TokenSDE"):
            SecondOrder(inner)  # type: ignore[arg-type]


ROWS = 2_000
SPREAD = random_law(tokens=3, length=3, dim=2, seed=6)  # no two rows closer than 110 degrees


def test_prompted_samples_follow_the_conditional_law() -> None:
    law = SPREAD
    tokens_BL = torch.tensor([[0, 2, 0]]).expand(ROWS, -1)
    known_BL = torch.tensor([[False, True, False]]).expand(ROWS, -1)
    start = State.from_tokens(law.table_VD, tokens_BL, known_BL)
    made = sample(law.denoiser(), SentenceSDE(gamma_max=15.0), start, budget=80, seed=1)
    given_S = law.sequences_SL[:, 1] == 2
    conditional = Law(
        table_VD=law.table_VD,
        sequences_SL=law.sequences_SL[given_S],
        p_S=law.p_S[given_S] / law.p_S[given_S].sum(),
    )
    assert law_p(conditional, made.tokens_BL) > 1e-4
