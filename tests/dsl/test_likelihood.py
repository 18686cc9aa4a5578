"""Every view of the likelihood against laws whose -log P(x) is known (003 eq. 3-5, 12, 13).

Shapes: S sequences of a law, B rows, L positions, V tokens.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import get_args

import pytest
import torch
from torch import Tensor

from dsl import chunks, unmasking
from dsl.calibration import calibration
from dsl.channel import observe
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiTConfig
from dsl.likelihood import (
    Estimate,
    PathName,
    Profile,
    ar,
    hybrid_bound,
    path_integral,
    perplexity,
    profile,
    roar,
)
from dsl.noise import Draws
from dsl.paths import Masked
from dsl.paths.grids import Grid, Information, Linear, Log, Quantile
from dsl.posterior import Posterior
from dsl.state import State
from dsl.truncation import Truncated
from tests.dsl.laws import Law, random_law

# No two rows of the table closer than 110 degrees: at SNR 40 nothing is left to learn.
LAW = random_law(tokens=3, length=3, dim=2, seed=6)
EVERYTHING = LAW.sequences_SL
EXACT_S = LAW.cross_entropies()
ENTROPY = (LAW.p_S * EXACT_S).sum().item()
PATHS: tuple[PathName, ...] = get_args(PathName)
GRIDS: list[Grid] = [Linear(), Log(), Quantile(mu=0.5, sigma=1.2)]


def average(law: Law, estimate: Estimate) -> tuple[float, float]:
    """Mean over the law of an estimate for each of its sequences, and its standard error."""
    mean = (law.p_S * estimate.mean_B).sum().item()
    return mean, (law.p_S * estimate.stderr_B).square().sum().sqrt().item()


def deviations(estimate: Estimate, exact_B: Tensor) -> Tensor:
    return (estimate.mean_B - exact_B) / estimate.stderr_B


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_every_path_integrates_to_the_likelihood(path: PathName, grid: Grid) -> None:
    """Path independence: within its own standard error for every text, and for their mean."""
    estimate = path_integral(
        LAW.denoiser(), EVERYTHING, gamma_max=40.0, steps=600, seed=0, path=path, grid=grid
    )
    deviation_S = deviations(estimate, EXACT_S)
    assert deviation_S.abs().max() < 4.5
    assert 0.6 < deviation_S.square().mean().sqrt() < 1.5
    mean, stderr = average(LAW, estimate)
    assert abs(mean - ENTROPY) < 4 * stderr
    assert stderr < 0.06


@cache
def remaining(gamma: float) -> tuple[Tensor, Tensor]:
    """``-E log P(x | z)`` of every sequence at a common SNR, per token, joint and not factorised,
    and its standard error; by many draws."""
    rows = 1_500
    tokens_BL = EVERYTHING.repeat(rows, 1)
    gamma_BL = torch.full(tokens_BL.shape, gamma, dtype=torch.float64)
    answer = LAW.denoiser()(observe(LAW.table_VD, tokens_BL, gamma_BL, Draws(99, 0, 0)))
    nats_B = -answer.weights_BS[torch.arange(len(tokens_BL)), LAW.index(tokens_BL)].log()
    nats_RS = nats_B.view(rows, -1) / 3
    return nats_RS.mean(0), nats_RS.std(0) / math.sqrt(rows)


@pytest.mark.parametrize("path", PATHS)
def test_truncation_falls_short_by_what_is_left(path: PathName) -> None:
    """003 eq. 12 at an SNR where a third of the information is still missing."""
    gamma_max = 1.5
    left_S, left_stderr_S = remaining(gamma_max)
    estimate = path_integral(
        LAW.denoiser(), EVERYTHING, gamma_max=gamma_max, steps=200, seed=3, path=path
    )
    gap_S = estimate.mean_B + left_S - EXACT_S
    assert (gap_S / estimate.stderr_B.hypot(left_stderr_S)).abs().max() < 4.5
    mean, stderr = average(LAW, estimate)
    assert mean < ENTROPY - 10 * stderr


def test_hybrid_bound_comes_down_to_the_likelihood() -> None:
    """From the product of marginals at gamma* = 0 down to -log P(x); never below it."""
    points = [
        average(
            LAW, hybrid_bound(LAW.denoiser(), EVERYTHING, gamma_star=gamma_star, steps=250, seed=4)
        )
        for gamma_star in (1e-6, 0.5, 1.0, 2.0, 4.0, 30.0)
    ]
    marginals = LAW.denoiser()(State.masked(1, 3, 2, dtype=torch.float64)).log_probs()[0]
    nats_S = -marginals.gather(1, EVERYTHING.T).sum(0) / 3
    assert points[0][0] == pytest.approx((LAW.p_S * nats_S).sum().item(), abs=1e-3)
    for (mean, stderr), (lower, stderr_) in itertools.pairwise(points):
        assert lower < mean + 3 * math.hypot(stderr, stderr_)
    for mean, stderr in points:
        assert mean > ENTROPY - 4 * stderr
    # The bound is loose at first by much more than its error, and tight at last.
    assert points[1][0] > ENTROPY + 5 * points[1][1]
    assert abs(points[-1][0] - ENTROPY) < 4 * points[-1][1]


def test_hybrid_bound_is_exact_where_tokens_are_independent() -> None:
    """No total correlation, so no gap at any gamma*."""
    p_V = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    law = replace(LAW, p_S=p_V[EVERYTHING].prod(1))
    for gamma_star in (0.2, 3.0):
        estimate = hybrid_bound(
            law.denoiser(), EVERYTHING, gamma_star=gamma_star, steps=200, seed=5
        )
        assert deviations(estimate, law.cross_entropies()).abs().max() < 4.5


def test_roar_is_unbiased() -> None:
    estimate = roar(LAW.denoiser(), EVERYTHING, samples=300, seed=6)
    deviation_S = deviations(estimate, EXACT_S)
    assert deviation_S.abs().max() < 4.5
    assert 0.5 < deviation_S.square().mean().sqrt() < 1.5
    mean, stderr = average(LAW, estimate)
    assert abs(mean - ENTROPY) < 4 * stderr
    assert stderr < 0.02


class Inconsistent:
    """Reads one law from an even number of known tokens and another from an odd one."""

    table_VD = LAW.table_VD
    even = LAW.denoiser()
    odd = replace(LAW, p_S=LAW.p_S.flip(0)).denoiser()

    def __call__(self, state: State) -> Posterior:
        rows_R = (state.revealed_BL.sum(1) % 2).nonzero().squeeze(1)
        return self.even(state).with_rows(state, rows_R, self.odd(state.rows(rows_R)))


def test_roar_against_all_subsets() -> None:
    """Its definition, enumerated, for conditionals that fit no joint law."""
    tokens_BL = EVERYTHING[:4]
    expected_B = torch.zeros(4, dtype=torch.float64)
    for size in range(3):
        subsets = list(itertools.combinations(range(3), size))
        for subset in subsets:
            known_BL = torch.zeros(4, 3, dtype=torch.bool)
            known_BL[:, list(subset)] = True
            state = State.from_tokens(LAW.table_VD, tokens_BL, known_BL)
            nats_BL = -Inconsistent()(state).log_probs().gather(2, tokens_BL[:, :, None])[:, :, 0]
            nats_BL = nats_BL.masked_fill(known_BL, 0)
            expected_B += nats_BL.sum(1) / (3 - size) / len(subsets) / 3
    estimate = roar(Inconsistent(), tokens_BL, samples=600, seed=7)
    assert deviations(estimate, expected_B).abs().max() < 4
    assert (expected_B - EXACT_S[:4]).abs().max() > 10 * estimate.stderr_B.max()


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_few_steps_stay_unbiased(steps: int) -> None:
    """Thousands of short estimates average to the truth: no discretisation error is hidden."""
    tokens_BL = EVERYTHING[:1].expand(6_000, -1)
    for estimate in (
        path_integral(LAW.denoiser(), tokens_BL, gamma_max=40.0, steps=steps, seed=8),
        roar(LAW.denoiser(), tokens_BL, samples=steps, seed=8),
    ):
        mean, stderr = estimate.corpus()
        assert abs(mean - EXACT_S[0].item()) < 4 * stderr


@pytest.mark.parametrize("steps", [8, 32])
def test_standard_errors_are_not_too_small(steps: int) -> None:
    """Against the spread of many estimates of one number."""
    tokens_BL = EVERYTHING[3:4].expand(1_500, -1)
    views = [
        path_integral(LAW.denoiser(), tokens_BL, gamma_max=40.0, steps=steps, seed=9),
        path_integral(
            LAW.denoiser(), tokens_BL, gamma_max=40.0, steps=steps, seed=9, path="left_to_right"
        ),
        hybrid_bound(LAW.denoiser(), tokens_BL, gamma_star=2.0, steps=steps, seed=9),
        roar(LAW.denoiser(), tokens_BL, samples=steps, seed=9),
    ]
    for estimate in views:
        claimed = estimate.stderr_B.square().mean().sqrt()
        assert 0.9 < claimed / estimate.mean_B.std() < 2.0


@pytest.mark.parametrize("path", PATHS)
def test_nor_are_they_where_no_joint_law_fits(path: PathName) -> None:
    """There the integral depends on the order in which tokens rise. Where that is random, more
    steps have to average over it too."""
    tokens_BL = EVERYTHING[14:15].expand(400, -1)
    skewed = replace(LAW, p_S=LAW.p_S.pow(3) / LAW.p_S.pow(3).sum())
    sharpened = Truncated(skewed.denoiser(), temperature=0.3)
    estimate = path_integral(sharpened, tokens_BL, gamma_max=30.0, steps=512, seed=3, path=path)
    claimed = estimate.stderr_B.square().mean().sqrt()
    assert 0.8 < claimed / estimate.mean_B.std() < 2.0


def test_terms_at_the_ends_count_in_full() -> None:
    """On equal steps of SNR nearly all of the error is that of the first."""
    tokens_BL = EVERYTHING[3:4].expand(1_500, -1)
    estimate = path_integral(
        LAW.denoiser(), tokens_BL, gamma_max=1000.0, steps=8, seed=9, grid="linear"
    )
    assert 0.9 < estimate.stderr_B.square().mean().sqrt() / estimate.mean_B.std() < 1.3


def test_rows_do_not_depend_on_the_batch() -> None:
    tokens_BL = LAW.draw(8, seed=0)
    denoiser = LAW.denoiser()
    for view in (
        lambda rows, first: path_integral(
            denoiser, rows, gamma_max=9.0, steps=6, seed=1, path="staggered", first_row=first
        ),
        lambda rows, first: path_integral(
            denoiser, rows, gamma_max=9.0, steps=6, seed=1, path="random_order", first_row=first
        ),
        lambda rows, first: hybrid_bound(
            denoiser, rows, gamma_star=2.0, steps=6, seed=1, first_row=first
        ),
        lambda rows, first: roar(denoiser, rows, samples=6, seed=1, first_row=first),
    ):
        whole, part = view(tokens_BL, 0), view(tokens_BL[5:], 5)
        assert torch.equal(part.mean_B, whole.mean_B[5:])
        assert torch.equal(part.stderr_B, whole.stderr_B[5:])
        assert whole.mean_B.dtype == torch.float64
    measured = profile(denoiser, tokens_BL, [0.0, 1.0, 4.0], seed=1)
    part = profile(denoiser, tokens_BL[5:], [0.0, 1.0, 4.0], seed=1, first_row=5)
    assert torch.equal(part.error_GB, measured.error_GB[:, 5:])


def network(causal: bool) -> Denoiser:
    torch.manual_seed(0)
    backbone = DiTConfig(
        width=16, blocks=2, heads=2, cond_dim=8, tokens=5, dropout=0.0, causal=causal
    )
    denoiser = Denoiser(DenoiserConfig(backbone=backbone, embed_dim=4))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return denoiser.eval()


def test_ar_is_the_product_of_its_conditionals() -> None:
    denoiser = network(causal=True)
    tokens_BL = torch.randint(5, (3, 6), generator=torch.Generator().manual_seed(0))
    expected_B = torch.zeros(3, dtype=torch.float64)
    for position in range(6):
        known_BL = (torch.arange(6) < position).expand(3, -1)
        log_probs = denoiser(State.from_tokens(denoiser.table_VD, tokens_BL, known_BL)).log_probs()
        expected_B -= log_probs[torch.arange(3), position, tokens_BL[:, position]].detach() / 6
    estimate = ar(denoiser, tokens_BL)
    torch.testing.assert_close(estimate.mean_B, expected_B, atol=1e-5, rtol=0)
    assert estimate.stderr_B.tolist() == [0.0] * 3
    assert expected_B.std() > 1e-2
    with pytest.raises(ValueError, match="not causal"):
        ar(network(causal=False), tokens_BL)
    with pytest.raises(ValueError, match="causal, so it has seen no masked tokens; use ar"):
        roar(denoiser, tokens_BL, samples=2, seed=0)


def test_a_network_is_measured_without_gradients_and_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    denoiser = network(causal=False)
    tokens_BL = torch.randint(5, (3, 6), generator=torch.Generator().manual_seed(0))

    def views() -> list[Tensor]:
        return [
            path_integral(denoiser, tokens_BL, gamma_max=9.0, steps=4, seed=0).mean_B,
            hybrid_bound(denoiser, tokens_BL, gamma_star=9.0, steps=4, seed=0).mean_B,
            roar(denoiser, tokens_BL, samples=4, seed=0).mean_B,
        ]

    whole = views()
    assert not any(values.requires_grad for values in whole)
    assert all(values.isfinite().all() for values in whole)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 20)  # four positions a chunk
    for chunked, values in zip(views(), whole, strict=True):
        torch.testing.assert_close(chunked, values)


def test_profile_measures_the_error_field() -> None:
    """In closed form at SNR 0, where x_hat is the mean of the prior; falling; gone at the end."""
    tokens_BL = LAW.draw(4_000, seed=1)
    measured = profile(LAW.denoiser(), tokens_BL, [0.0, 0.5, 2.0, 8.0, 40.0], seed=2)
    prior_LD = LAW.denoiser()(State.masked(1, 3, 2, dtype=torch.float64)).mean()[0]
    torch.testing.assert_close(
        measured.error_GB[0],
        (LAW.table_VD[tokens_BL] - prior_LD).square().sum(2).mean(1),
    )
    mean_G = measured.mean_G
    assert (mean_G.diff() < 0).all()
    assert mean_G[-1] < 1e-4
    for gammas in ([0.0], [1.0, 2.0], [0.0, 2.0, 2.0], [0.0, math.nan], [0.0, 1.0, math.inf]):
        with pytest.raises(ValueError, match="increase from 0"):
            profile(LAW.denoiser(), tokens_BL[:2], gammas, seed=0)
    with pytest.raises(ValueError, match="no profile of no rows"):
        profile(LAW.denoiser(), tokens_BL[:0], [0.0, 1.0], seed=0)


def test_information_grid_counts_nats() -> None:
    """The trapezoids sum to the entropy, and a path on that grid is estimated with less error
    than on one that wastes its steps where nothing happens."""
    gammas = [0.15 * k**1.5 for k in range(42)]
    measured = profile(LAW.denoiser(), LAW.draw(3_000, seed=3), gammas, seed=4)
    grid = measured.information()
    assert isinstance(grid, Information)
    assert grid.gammas == tuple(gammas)
    assert grid.nats[-1] == pytest.approx(ENTROPY, rel=0.05)
    errors = [
        path_integral(
            LAW.denoiser(), EVERYTHING, gamma_max=gammas[-1], steps=100, seed=5, grid=each
        )
        for each in (grid, Linear())
    ]
    assert errors[0].stderr_B.mean() < 0.9 * errors[1].stderr_B.mean()
    mean, stderr = average(LAW, errors[0])
    assert abs(mean - ENTROPY) < 4 * stderr


def test_information_of_a_noisy_profile_is_monotone() -> None:
    rows = torch.tensor([4.0, 1.0, 3.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    grid = Profile((0.0, 1.0, 2.0, 3.0, 4.0, 5.0), rows[:, None]).information()
    # 1, 3, 2 are levelled to their mean 2; the area of a trapezoid of height E is half of it.
    assert grid.nats == pytest.approx((0.0, 1.5, 2.5, 3.5, 4.0, 4.0), abs=1e-5)
    assert all(low < high for low, high in itertools.pairwise(grid.nats))


def test_no_information_means_equal_steps_of_snr() -> None:
    """As of a network that is certain from the start."""
    grid = Profile((0.0, 2.0, 8.0), torch.zeros(3, 4, dtype=torch.float64)).information()
    assert [grid.gamma(share, 8.0) for share in (0.25, 0.5, 1.0)] == [2.0, 4.0, 8.0]


def test_units() -> None:
    assert perplexity(math.log(50257)) == pytest.approx(50257)
    assert perplexity(1e4) == math.inf
    mean, stderr = Estimate(torch.tensor([1.0, 3.0]), torch.zeros(2)).corpus()
    assert (mean, stderr) == (2.0, pytest.approx(1.0))
    with warnings.catch_warnings(action="error"):
        mean, stderr = Estimate(torch.tensor([1.0]), torch.zeros(1)).corpus()
    assert mean == 1.0
    assert math.isnan(stderr)
    with pytest.raises(ValueError, match="no mean of no rows"):
        Estimate(torch.zeros(0), torch.zeros(0)).corpus()


def test_what_cannot_be_estimated_is_refused() -> None:
    denoiser, tokens_BL = LAW.denoiser(), EVERYTHING[:2]
    for gamma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="gamma_max"):
            path_integral(denoiser, tokens_BL, gamma_max=gamma, steps=4, seed=0)
        with pytest.raises(ValueError, match="gamma_star"):
            hybrid_bound(denoiser, tokens_BL, gamma_star=gamma, steps=4, seed=0)
    for steps in (0, 1):
        with pytest.raises(ValueError, match="steps must be at least 2"):
            path_integral(denoiser, tokens_BL, gamma_max=1.0, steps=steps, seed=0)
        with pytest.raises(ValueError, match="steps must be at least 2"):
            hybrid_bound(denoiser, tokens_BL, gamma_star=1.0, steps=steps, seed=0)
        with pytest.raises(ValueError, match="samples must be at least 2"):
            roar(denoiser, tokens_BL, samples=steps, seed=0)
    for grid in ("quantile", "lag"):
        with pytest.raises(ValueError, match="grid must be one of linear, log"):
            path_integral(denoiser, tokens_BL, gamma_max=1.0, steps=4, seed=0, grid=grid)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="staggered"):
        path_integral(denoiser, tokens_BL, gamma_max=1.0, steps=4, seed=0, path="sideways")


WHOLE = torch.tensor([[0, 1, 2]])
MEASURES: dict[str, Callable[[Tensor], object]] = {
    "path_integral": lambda x: path_integral(LAW.denoiser(), x, gamma_max=1.0, steps=2, seed=0),
    "hybrid_bound": lambda x: hybrid_bound(LAW.denoiser(), x, gamma_star=1.0, steps=2, seed=0),
    "roar": lambda x: roar(LAW.denoiser(), x, samples=2, seed=0),
    "profile": lambda x: profile(LAW.denoiser(), x, [0.0, 1.0], seed=0),
    "ar": lambda x: ar(network(causal=True), x),
    "unmasking": lambda x: unmasking.estimate(LAW.denoiser(), x, Masked(), budget=3, seed=0),
    "calibration": lambda x: calibration(LAW.denoiser(), x, gammas=[1.0], seed=0),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_texts_that_are_no_ids_are_refused(measure: str) -> None:
    """An id of -1 would be measured as the last token."""
    for outside in (WHOLE - 1, WHOLE + 3):
        with pytest.raises(ValueError, match=r"a token id lies outside \[0, [35]\)"):
            MEASURES[measure](outside)
    for strange in (WHOLE[0], WHOLE.double()):
        with pytest.raises(ValueError, match=r"texts must be ids \[B, L\]"):
            MEASURES[measure](strange)
    MEASURES[measure](WHOLE.to(torch.uint16))  # as shards hold them
