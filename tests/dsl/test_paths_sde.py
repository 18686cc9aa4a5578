"""Continuous paths: grids, curvature, per-token steps that arrive, and orders of convergence.

Shapes: B rows, L positions, D table dimension.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from dsl.exact import ExactPosterior
from dsl.noise import Draws, Stream
from dsl.paths import (
    Clock,
    Hybrid,
    Information,
    Masked,
    Quantile,
    SecondOrder,
    SentenceSDE,
    TokenSDE,
)
from dsl.paths.token_sde import jvp
from dsl.posterior import Posterior
from dsl.sampling import Sample, sample
from dsl.state import State
from tests.dsl.laws import Law, Written, random_law, ring, total_variation

INF = float("inf")
SIGNS = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
LAW = replace(random_law(tokens=3, length=4, dim=2, seed=3), table_VD=ring(3))


class Walk:
    """The SNR before every call ``[calls, B, L]``, and the last prediction."""

    name = "walk"

    def __init__(self) -> None:
        self.gamma: list[Tensor] = []

    def observe(self, clock: Clock, before: State, posterior: Posterior, after: State) -> None:
        self.gamma.append(before.gamma_BL)
        if clock.call + 1 == clock.budget:
            self.mean_BLD = posterior.mean()

    def result(self) -> Walk:
        return self


def draw(path: Any, budget: int, rows: int = 16, law: Law = LAW) -> Sample:
    state = State.masked(rows, law.sequences_SL.shape[1], law.table_VD.shape[1])
    return sample(law.denoiser(), path, state, budget=budget, seed=2, recorders=[Walk()])


# --- grids -----------------------------------------------------------------------------------

PROFILE = Information(gammas=(0.0, 1.0, 4.0, 30.0), nats=(0.0, 0.5, 1.0, 1.5))


@pytest.mark.parametrize("grid", ["linear", "log", Quantile(mu=1.0, sigma=0.8), PROFILE], ids=repr)
def test_grids_rise_from_0_to_gamma_max(grid: Any) -> None:
    path = SentenceSDE(gamma_max=25.0, grid=grid)
    gammas = [path.gamma(share / 64) for share in range(65)]
    assert gammas[0] == 0
    assert gammas[-1] == pytest.approx(25.0, rel=1e-12)
    assert all(low < high for low, high in pairwise(gammas))
    walk = draw(path, 9).recorded["walk"]
    at = torch.tensor([path.gamma(move / 8) for move in range(9)], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(walk.gamma), at[:, None, None].expand(9, 16, 4))


def test_quantiles_are_equal_shares_of_the_log_normal() -> None:
    path = SentenceSDE(gamma_max=25.0, grid=Quantile(mu=1.0, sigma=0.8))
    law = NormalDist(1.0, 0.8)
    shares = [law.cdf(math.log(path.gamma(k / 8))) for k in range(1, 9)]
    assert [share / shares[-1] for share in shares] == pytest.approx([k / 8 for k in range(1, 9)])


def test_information_takes_equal_nats() -> None:
    path = SentenceSDE(gamma_max=30.0, grid=PROFILE)
    assert [path.gamma(k / 6) for k in range(7)] == pytest.approx([0, 0.5, 1, 2.5, 4, 17, 30])


@pytest.mark.parametrize(
    "bad",
    [
        lambda: SentenceSDE(gamma_max=31.0, grid=PROFILE),
        lambda: SentenceSDE(gamma_max=INF),
        lambda: SentenceSDE(gamma_max=0.0),
        lambda: SentenceSDE(gamma_max=3.0, grid="lin"),  # type: ignore[arg-type]
        lambda: Quantile(mu=0.0, sigma=0.0),
        lambda: Quantile(mu=0.0, sigma=INF),
        lambda: SentenceSDE(gamma_max=100.0, grid=Quantile(mu=800.0, sigma=1.0)),
        lambda: SentenceSDE(gamma_max=1.0, grid=Quantile(mu=2.69, sigma=0.3)),
        lambda: Information(gammas=(0.0, 2.0, 1.0), nats=(0.0, 1.0, 2.0)),
        lambda: Information(gammas=(0.0, 2.0), nats=(0.1, 1.0)),
        lambda: TokenSDE(gamma_max=3.0, delta=0.0),
        lambda: TokenSDE(gamma_max=-3.0, delta=1.0),
        lambda: TokenSDE(gamma_max=INF, delta=1.0),
        lambda: TokenSDE(gamma_max=3.0, delta=1.0, curvature="fd"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_told(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"must|lies beyond|need"):
        bad()


# --- curvature and per-token steps -----------------------------------------------------------


def test_jvp_is_the_derivative_along_the_drift() -> None:
    """003 eq. 21, by central differences; masked, faint, strong and revealed tokens together."""
    gamma_BL = torch.tensor([[0.0, 0.3, 6.0, INF], [0.0, 0.0, 0.0, 0.0]])
    known_BL = torch.zeros(2, 4, dtype=torch.bool)
    state = State.from_tokens(LAW.table_VD, LAW.draw(2, 0), known_BL, gamma_BL).like(LAW.table_VD)
    denoiser = LAW.denoiser()
    x_hat_BLD = denoiser(state).mean()
    clock = Clock(call=0, budget=9, draws=Draws(0, 0, 0), evaluate=denoiser)
    drift_BLD = x_hat_BLD * ~state.revealed_BL[..., None]
    h = 1e-5
    ahead, behind = (
        denoiser(replace(state, z_BLD=state.z_BLD + s * h * drift_BLD)).mean() for s in (1, -1)
    )
    by_difference_BL = ((ahead - behind) / (2 * h)).norm(dim=-1)
    by_difference_BL = by_difference_BL.masked_fill(state.revealed_BL, 0)
    kappa_BL = jvp(state, x_hat_BLD, clock)
    torch.testing.assert_close(kappa_BL, by_difference_BL, rtol=1e-6, atol=1e-8)
    assert (kappa_BL[:, :3] > 1e-4).all()


@pytest.mark.parametrize("curvature", ["secant", "jvp"])
@pytest.mark.parametrize("budget", [1, 2, 3, 8, 33])
def test_infinite_tolerance_is_the_linear_grid_bit_for_bit(curvature: Any, budget: int) -> None:
    sentence = draw(SentenceSDE(gamma_max=17.3), budget)
    token = draw(TokenSDE(gamma_max=17.3, delta=INF, curvature=curvature), budget)
    assert torch.equal(sentence.tokens_BL, token.tokens_BL)
    walks = [made.recorded["walk"].gamma for made in (sentence, token)]
    assert all(torch.equal(*pair) for pair in zip(*walks, strict=True))
    assert sentence.calls == token.calls


@pytest.mark.parametrize("curvature", ["secant", "jvp"])
@pytest.mark.parametrize("budget", [2, 3, 4, 5, 12, 13])
@pytest.mark.parametrize("delta", [1e-6, 0.02, 1.0])
def test_it_arrives_within_the_budget_and_says_what_that_took(
    delta: float, budget: int, curvature: Any
) -> None:
    made = draw(TokenSDE(gamma_max=20.0, delta=delta, curvature=curvature), budget)
    gamma = torch.stack(made.recorded["walk"].gamma)
    assert (gamma.diff(dim=0) >= 0).all()
    torch.testing.assert_close(gamma[-1], torch.full_like(gamma[-1], 20.0))
    assert made.calls <= budget
    shortfall_B = made.recorded["shortfall_B"]
    assert ((shortfall_B >= 0) & (shortfall_B <= 20)).all()


def test_uncertain_tokens_wait_and_a_tight_tolerance_is_reported() -> None:
    tight, loose = (
        draw(TokenSDE(gamma_max=20.0, delta=delta), 24).recorded for delta in (0.01, 5.0)
    )
    assert tight["shortfall_B"].min() > 1 > 1e-6 > loose["shortfall_B"].max()
    spread = torch.stack(tight["walk"].gamma).std(dim=2).amax(0)
    assert (spread > 0.5).all()


def foreseen(gamma: list[float], x_hat: list[float]) -> tuple[State, Posterior]:
    """One row at these SNRs, and a posterior of two tokens, 1 and -1, with these means."""
    gamma_BL, x_hat_L = (torch.tensor(values, dtype=torch.float64) for values in (gamma, x_hat))
    tokens_BL = torch.zeros(1, len(gamma), dtype=torch.int64)
    state = State.from_tokens(SIGNS, tokens_BL, tokens_BL.bool(), gamma_BL[None])
    return state, Written(state, SIGNS, torch.stack([1 + x_hat_L, 1 - x_hat_L], 1).div(2).log())


def at(call: int, budget: int) -> Clock:
    return Clock(call=call, budget=budget, draws=Draws(0, 0, call))


def test_a_step_is_a_share_of_what_is_left() -> None:
    """Steps of 3 on the linear grid; ``s / (s + moves left - 1)`` for a weight s below one."""
    path = TokenSDE(gamma_max=12.0, delta=0.15)
    state, posterior = foreseen([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    gamma_BL, carry = path.target(state, posterior, path.init(state), at(0, 5))
    assert gamma_BL.tolist() == [[3.0, 3.0, 3.0]]
    walked, beyond_L = [3.0, 3.0, 3.0], [0.0, 0.0, 0.0]
    for call, turns in ((1, (0.0, 0.3, 0.9)), (2, (0.3, 0.0, -0.6))):
        assert carry.x_hat_BLD is not None
        x_hat = (carry.x_hat_BLD.flatten() + torch.tensor(turns)).tolist()
        gamma_BL, carry = path.target(*foreseen(walked, x_hat), carry, at(call, 5))
        left = 4 - call
        for token, turn in enumerate(turns):
            weight = min(0.15 / (abs(turn) / 3 + 1e-6) / 3, 1.0)
            moved = (12 - walked[token]) * weight / (weight + left - 1)
            beyond_L[token] += max(moved - weight * 3, 0.0)
            walked[token] += moved
        assert gamma_BL.flatten().tolist() == pytest.approx(walked, rel=1e-6)
    assert min(beyond_L[1:]) > 0.1
    assert path.report(carry)["shortfall_B"].item() == pytest.approx(sum(beyond_L) / 3, rel=1e-6)


def test_a_jvp_is_charged_to_the_budget() -> None:
    """Every move but the last, and the first of an odd budget, costs two calls."""
    asked = []
    denoiser = LAW.denoiser()

    class Spy:
        table_VD = LAW.table_VD

        def __call__(self, state: State) -> Posterior:
            asked.append(state)
            return denoiser(state)

    for budget in range(2, 12):
        asked.clear()
        path = TokenSDE(gamma_max=20.0, delta=0.1, curvature="jvp")
        made = sample(Spy(), path, State.masked(3, 4, 2), budget=budget, seed=0)
        assert made.calls == len(asked) == budget
        assert (made.row_calls_B == made.calls).all()


@pytest.mark.parametrize("finished", [1, 3])
def test_calls_are_those_that_were_made_however_much_is_known(finished: int) -> None:
    """With all rows finished from the start there are none; a jvp evaluates every row."""
    asked: list[int] = []
    denoiser = LAW.denoiser()

    class Spy:
        table_VD = LAW.table_VD

        def __call__(self, state: State) -> Posterior:
            asked.append(len(state.tokens_BL))
            return denoiser(state)

    tokens_BL = LAW.draw(3, seed=0)
    known_BL = (torch.arange(3) < finished)[:, None].expand_as(tokens_BL)
    start = State.from_tokens(LAW.table_VD, tokens_BL, known_BL)
    path = TokenSDE(gamma_max=20.0, delta=0.1, curvature="jvp")
    made = sample(Spy(), path, start, budget=8, seed=0)
    assert made.calls == len(asked) == (0 if finished == 3 else 8)
    assert made.row_calls_B.sum() == sum(asked)
    assert torch.equal(made.tokens_BL[:finished], tokens_BL[:finished])


def test_no_path_can_overdraw_the_budget() -> None:
    class Greedy(Masked):
        def target(self, state: State, posterior: Posterior, carry: None, clock: Clock) -> Any:
            for _ in range(3):
                clock.evaluate(state)
            return state.gamma_BL, None

    with pytest.raises(ValueError, match="more states than its budget"):
        draw(Greedy(), 6)


def test_a_first_stage_reports_through_a_hybrid() -> None:
    first = TokenSDE(gamma_max=6.0, delta=0.05, curvature="jvp")
    made = draw(Hybrid(first, Masked(), split=(9, 8)), 17)
    assert (made.recorded["shortfall_B"] > 0).all()
    gamma = made.recorded["walk"].gamma
    assert (gamma[4] < 6.0).any()
    assert (gamma[5] == 6.0).all()  # after 9 calls: 5 moves
    # A second stage that has none to report adds none.
    again = draw(Hybrid(first, TokenSDE(gamma_max=6.0, delta=1e9), split=(9, 8)), 17)
    torch.testing.assert_close(again.recorded["shortfall_B"], made.recorded["shortfall_B"])


# --- order of convergence --------------------------------------------------------------------

FINEST = 32
ONE_TOKEN = Law(
    table_VD=torch.tensor([[1.0], [-1.0]], dtype=torch.float64),
    sequences_SL=torch.tensor([[0], [1]]),
    p_S=torch.tensor([0.7, 0.3], dtype=torch.float64),
)


def coupled(moves: int) -> type:
    """Draws whose coarse steps add up the finest steps' noise: one Brownian path for all."""

    class Coupled:
        def __init__(self, seed: int, first_row: int, step: int) -> None:
            each = FINEST // moves
            self.fine = [Draws(seed, first_row, step * each + k) for k in range(each)]

        def normal(self, shape: torch.Size, dtype: torch.dtype, *device: object) -> Tensor:
            noise = torch.stack([draws.normal(shape, dtype) for draws in self.fine])
            return noise.sum(0) / math.sqrt(len(self.fine))

        def uniform(self, rows: int, length: int, stream: Stream) -> Tensor:
            return self.fine[0].uniform(rows, length, stream)

    return Coupled


@pytest.mark.parametrize(
    ("path", "order"),
    [
        (SentenceSDE(gamma_max=2.0), 1.0),
        (SecondOrder(SentenceSDE(gamma_max=2.0)), 2.0),
    ],
    ids=["euler_maruyama", "second_order"],
)
def test_the_error_in_law_falls_with_the_order_of_the_move(
    monkeypatch: pytest.MonkeyPatch, path: Any, order: float
) -> None:
    """How sure the last prediction is, ``E |x_hat|^2``, against the number of moves: the gap
    between a budget and its double shrinks by two for first order, by four for second."""
    sharpness = []
    levels = [2, 4, 8, 16, 32]
    for moves in levels:
        monkeypatch.setattr("dsl.sampling.Draws", coupled(moves))
        mean_BLD = draw(path, moves + 1, rows=40000, law=ONE_TOKEN).recorded["walk"].mean_BLD
        sharpness.append(mean_BLD.square().sum((1, 2)).mean().item())
    gaps = [abs(high - low) for low, high in pairwise(sharpness)]
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(gaps)]
    assert sum(slopes) / len(slopes) == pytest.approx(order, abs=0.25)


def test_second_order_costs_no_call_and_keeps_the_grid() -> None:
    plain = draw(SentenceSDE(gamma_max=9.0, grid="log"), 12)
    second = draw(SecondOrder(SentenceSDE(gamma_max=9.0, grid="log")), 12)
    assert plain.calls == second.calls == 12
    walks = [made.recorded["walk"].gamma for made in (plain, second)]
    assert all(torch.equal(*pair) for pair in zip(*walks, strict=True))
    assert "shortfall_B" in draw(SecondOrder(TokenSDE(gamma_max=9.0, delta=0.1)), 12).recorded


def test_a_turn_counts_by_the_steps_before_and_after_it() -> None:
    """Steps of 1 and 3: by 3 / (2 · 1)."""
    grid = Information(gammas=(0.0, 1.0, 4.0), nats=(0.0, 1.0, 2.0))
    path = SecondOrder(SentenceSDE(gamma_max=4.0, grid=grid))
    state, before = foreseen([0.0, 0.0], [0.1, -0.4])
    gamma_BL, carry = path.target(state, before, path.init(state), at(0, 3))
    assert gamma_BL.tolist() == [[1.0, 1.0]]
    assert torch.equal(path.steer(before, carry).mean(), before.mean())
    state, posterior = foreseen([1.0, 1.0], [0.3, 0.2])
    gamma_BL, carry = path.target(state, posterior, carry, at(1, 3))
    assert gamma_BL.tolist() == [[4.0, 4.0]]
    drift_L = path.steer(posterior, carry).mean().flatten()
    assert drift_L.tolist() == pytest.approx([0.3 + 1.5 * 0.2, 0.2 + 1.5 * 0.6])


def test_a_token_that_waited_or_hardly_moved_does_not_turn() -> None:
    """Its last step was 0, or less than a twelfth of the present one, which is 3."""
    grid = Information(gammas=(0.0, 1.0, 4.0), nats=(0.0, 1.0, 2.0))
    path = SecondOrder(SentenceSDE(gamma_max=4.0, grid=grid))
    state, before = foreseen([1.0, 0.8, 0.7], [0.1, 0.1, 0.1])
    gamma_BL, carry = path.target(state, before, path.init(state), at(0, 3))
    assert gamma_BL.tolist() == [[1.0, 1.0, 1.0]]
    state, posterior = foreseen([1.0, 1.0, 1.0], [0.3, 0.3, 0.3])
    _, carry = path.target(state, posterior, carry, at(1, 3))
    drift_L = path.steer(posterior, carry).mean().flatten()
    assert drift_L.tolist() == pytest.approx([0.3, 0.3, 0.3 + 3 / (2 * 0.3) * 0.2])


def test_a_remnant_of_a_step_is_not_drawn_out() -> None:
    """Soft evidence just below the grid: its first move says next to nothing of how x_hat turns."""
    rows, gamma_L = 2000, torch.tensor([20 / 12 - 1e-6, 0.0, 0.0, 0.0], dtype=torch.float64)
    tokens_BL = torch.tensor([[2, 2, 2, 2]]).expand(rows, -1)
    known_BL = torch.zeros(rows, 4, dtype=torch.bool)
    start = State.from_tokens(LAW.table_VD, tokens_BL, known_BL, gamma_L.expand(rows, -1))
    posterior = LAW.denoiser()(start.rows(torch.tensor([0])))
    assert isinstance(posterior, ExactPosterior)
    given = replace(LAW, p_S=posterior.weights_BS[0])
    path = SecondOrder(SentenceSDE(gamma_max=20.0))
    made = sample(LAW.denoiser(), path, start, budget=13, seed=0)
    assert total_variation(given, made.tokens_BL) < 0.15


def test_the_steps_of_a_coarse_log_grid_are_second_order() -> None:
    """They grow fourfold from one to the next, and drawing the turn out as much still helps."""
    log = SentenceSDE(gamma_max=60.0, grid="log")
    first, second = (
        total_variation(LAW, draw(path, 4, rows=4000).tokens_BL) for path in (log, SecondOrder(log))
    )
    assert second < 0.9 * first
