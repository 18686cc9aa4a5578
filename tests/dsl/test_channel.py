"""Each move of `transition` against its closed form in distribution, and what must not move.

Shapes: B rows, L positions, V tokens, D table dimension.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsl.channel import transition
from dsl.exact import ExactDenoiser
from dsl.noise import Draws
from dsl.posterior import Posterior
from dsl.state import State
from tests.dsl.laws import chi_square_p, normal_p, random_law

LAW = random_law(tokens=4, length=3, dim=3, seed=5)
DENOISER = LAW.denoiser()
TABLE = LAW.table_VD
ROWS = 20_000
TEXT = torch.tensor([[2, 0, 3]]).expand(ROWS, -1)
# The law that is certain of one text: its posterior mean is that text's own rows.
CERTAIN = ExactDenoiser(TABLE, TEXT[:1])
P = 1e-4  # a fixed seed makes every p-value repeatable
SNRS = [0.0, 1e-8, 1e-3, 1.0, 1e8, math.inf]


def step(number: int) -> Draws:
    return Draws(seed=17, first_row=0, step=number)


def known(gamma: float = math.inf) -> State:
    """`TEXT`, editable; at a finite gamma as noise-free evidence."""
    nothing_BL = torch.zeros(TEXT.shape, dtype=torch.bool)
    return State.from_tokens(TABLE, TEXT, nothing_BL, torch.full(TEXT.shape, gamma))


def move(state: State, gamma: float, number: int, denoiser: ExactDenoiser = DENOISER) -> State:
    posterior = denoiser(state)
    return transition(state, torch.full_like(state.gamma_BL, gamma), posterior, step(number))


def whitened(z_BLD: Tensor, gamma: float) -> Tensor:
    """Standard normal when ``z`` is `TEXT` seen through the channel at ``gamma``."""
    return (z_BLD - gamma * TABLE[TEXT]) / math.sqrt(gamma)


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


CORRELATION_BOUND = 5 / math.sqrt(TEXT.numel() * TABLE.shape[1])


@pytest.mark.parametrize(("now", "later"), [(0.0, 2.0), (0.3, 0.7), (5.0, 50.0)])
def test_up_is_drift_and_diffusion(now: float, later: float) -> None:
    state = known(now)
    after = move(state, later, 0)
    h = later - now
    drift_BLD = h * DENOISER(state).log_probs().exp() @ TABLE
    noise_BLD = (after.z_BLD - state.z_BLD - drift_BLD) / math.sqrt(h)
    assert normal_p(noise_BLD) > P
    # Independent across positions and dimensions.
    flat = noise_BLD.flatten(1)
    covariance = flat.T @ flat / ROWS
    assert (covariance - torch.eye(flat.shape[1])).abs().max() < 5 * (2 / ROWS) ** 0.5
    assert (after.gamma_BL == later).all()
    assert (after.tokens_BL == 0).all()


@pytest.mark.parametrize("gamma", [1e-3, 1.0, 40.0])
def test_hiding_is_the_channel(gamma: float) -> None:
    after = move(known(), gamma, 0)
    assert normal_p(whitened(after.z_BLD, gamma)) > P
    assert (after.tokens_BL == 0).all()


@pytest.mark.parametrize("start", ["climbed", "hidden"])
def test_bridge_composes_with_the_channel(start: str) -> None:
    """Down from 6 to 2: the channel at 2, and the increment that was lost is the channel's own,
    independent of what stayed. Together: the joint law of one Brownian path."""
    high, low = 6.0, 2.0
    blank = State.masked(ROWS, 3, 3, dtype=torch.float64)
    up = move(blank, high, 0, CERTAIN) if start == "climbed" else move(known(), high, 0)
    down = move(up, low, 1)
    kept = whitened(down.z_BLD, low)
    lost = whitened(up.z_BLD - down.z_BLD, high - low)
    assert normal_p(whitened(up.z_BLD, high)) > P
    assert normal_p(kept) > P
    assert normal_p(lost) > P
    assert abs(correlation(kept, lost)) < CORRELATION_BOUND


def test_two_steps_up_are_one_when_certain() -> None:
    blank = State.masked(ROWS, 3, 3, dtype=torch.float64)
    first = move(blank, 1.0, 0, CERTAIN)
    second = move(first, 3.0, 1, CERTAIN)
    assert normal_p(whitened(second.z_BLD, 3.0)) > P
    fresh = whitened(second.z_BLD - first.z_BLD, 2.0)
    assert abs(correlation(whitened(first.z_BLD, 1.0), fresh)) < CORRELATION_BOUND


def test_reveal_draws_from_the_posterior() -> None:
    evidence_BLD = torch.tensor([[0.5, -1, 2], [0, 0, 0], [1, 1, -3.0]], dtype=torch.float64)
    state = replace(known(1.0), z_BLD=evidence_BLD.expand(ROWS, -1, -1))
    after = move(state, math.inf, 0)
    probs_LV = DENOISER(state).log_probs()[0].exp()
    for position in range(3):
        counts_V = torch.bincount(after.tokens_BL[:, position], minlength=4)
        assert chi_square_p(counts_V, probs_LV[position]) > P
    assert (after.z_BLD == 0).all()
    assert after.gamma_BL.isinf().all()
    # Positions are drawn independently of each other given the state.
    pairs = torch.bincount(after.tokens_BL[:, 0] * 4 + after.tokens_BL[:, 1], minlength=16)
    assert chi_square_p(pairs, torch.outer(probs_LV[0], probs_LV[1]).flatten()) > P


@pytest.mark.parametrize("now", [1e-8, 3.0, 1e8, math.inf])
def test_down_to_zero_forgets_exactly(now: float) -> None:
    after = move(known(now), 0.0, 0)
    assert torch.equal(after.z_BLD, torch.zeros_like(after.z_BLD))
    assert not after.z_BLD.signbit().any()  # no -0.0 either: equal states have equal bits
    assert torch.equal(after.tokens_BL, torch.zeros_like(after.tokens_BL))
    assert (after.gamma_BL == 0).all()


class Asked(Posterior):
    """A posterior that remembers where it was read."""

    def __init__(self, answer: Posterior) -> None:
        super().__init__(answer.state, answer.table_VD)
        self.answer = answer
        self.positions: set[int] = set()

    def _log_probs_unrevealed(self, at_N: Tensor) -> Tensor:
        self.positions.update(at_N.tolist())
        return self.answer._log_probs_unrevealed(at_N)

    def with_rows(self, state: State, rows_R: Tensor, fresh: Posterior) -> Posterior:
        raise NotImplementedError


@settings(max_examples=200)
@given(
    now=st.lists(st.sampled_from(SNRS), min_size=6, max_size=6),
    later=st.lists(st.sampled_from(SNRS), min_size=6, max_size=6),
    known_=st.lists(st.booleans(), min_size=6, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
def test_any_pair_of_snrs(
    now: list[float], later: list[float], known_: list[bool], dtype: torch.dtype, seed: int
) -> None:
    """No NaN; frozen and unmoved tokens keep every bit; a state is canonical afterwards; the
    posterior is read where a token moves up and nowhere else."""
    table_VD = TABLE.to(dtype)
    before = State.from_tokens(
        table_VD,
        torch.tensor([[0, 1, 2], [3, 3, 0]]),
        torch.tensor(known_).view(2, 3),
        torch.tensor(now).view(2, 3),
    )
    denoiser = ExactDenoiser(table_VD, LAW.sequences_SL, LAW.p_S)
    posterior = Asked(denoiser(before))
    next_BL = torch.tensor(later, dtype=dtype).view(2, 3)
    after = transition(before, next_BL, posterior, Draws(seed, 0, 0))

    expected_BL = torch.where(before.frozen_BL, before.gamma_BL, next_BL)
    assert torch.equal(after.gamma_BL, expected_BL)
    assert torch.equal(after.frozen_BL, before.frozen_BL)
    assert after.z_BLD.isfinite().all()
    assert after.z_BLD.dtype == dtype
    still_BL = expected_BL == before.gamma_BL
    assert torch.equal(after.z_BLD[still_BL], before.z_BLD[still_BL])
    assert torch.equal(after.tokens_BL[still_BL], before.tokens_BL[still_BL])
    assert (after.z_BLD[~after.evidence_BL] == 0).all()
    assert (after.z_BLD[after.evidence_BL & ~still_BL] != 0).any(-1).all()
    assert (after.tokens_BL[~after.revealed_BL] == 0).all()
    assert ((after.tokens_BL >= 0) & (after.tokens_BL < 4)).all()
    rising_BL = expected_BL > before.gamma_BL
    assert posterior.positions == set(rising_BL.flatten().nonzero().flatten().tolist())


def test_a_move_leaves_its_argument_alone() -> None:
    before = known(2.0)
    copies = before.z_BLD.clone(), before.tokens_BL.clone(), before.gamma_BL.clone()
    move(before, math.inf, 0)
    move(before, 1.0, 0)
    kept = before.z_BLD, before.tokens_BL, before.gamma_BL
    assert all(torch.equal(a, b) for a, b in zip(copies, kept, strict=True))


def test_no_move_is_the_same_state() -> None:
    before = known(2.0)
    assert move(before, 2.0, 0) is before


@pytest.mark.parametrize("gamma", [-1e-9, math.nan, -math.inf])
def test_impossible_targets_are_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="negative or NaN"):
        move(known(2.0), gamma, 0)
