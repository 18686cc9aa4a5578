"""The drawn SNRs follow the stated laws, and only the generator decides them."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from dsl.noise import generator
from dsl.paths import Information
from dsl.support import InformationUniform, LogNormal, Mixed, Roar, Support, stratified

MEASURED = Information(gammas=(0.0, 1.0, 9.0), nats=(0.0, 3.0, 4.0))

SUPPORTS: list[Support] = [
    Roar(),
    Roar(gamma_min=1.0, c=0.8, gamma_max=100.0),
    LogNormal(mu=1.4, sigma=0.55),
    LogNormal(per="token", gamma_max=40.0),
    InformationUniform(profile=MEASURED, gamma_max=9.0),
    Mixed(),
]


def ks_distance(sample_N: Tensor, cdf) -> float:
    """Kolmogorov-Smirnov distance; 1.95 / sqrt(N) is exceeded once in 1000 by a true law."""
    ordered_N = sample_N.double().sort().values
    expected_N = torch.tensor([cdf(float(x)) for x in ordered_N], dtype=torch.float64)
    steps_N = torch.arange(len(ordered_N) + 1, dtype=torch.float64) / len(ordered_N)
    return float(torch.maximum(steps_N[1:] - expected_N, expected_N - steps_N[:-1]).max())


def critical(size: int) -> float:
    return 1.95 / math.sqrt(size)


def many(support: Support, calls: int, rows: int, length: int) -> Tensor:
    """``[calls, B, L]``: what one lane sees over many steps."""
    return torch.stack(
        [support.sample(rows, length, generator(3, step, 0)) for step in range(calls)]
    )


@pytest.mark.parametrize("support", SUPPORTS, ids=repr)
def test_a_draw_is_a_function_of_the_generator(support):
    first = support.sample(6, 11, generator(5, 7, 1))
    assert first.shape == (6, 11)
    assert first.dtype == torch.float32
    assert (first >= 0).all()
    assert torch.equal(first, support.sample(6, 11, generator(5, 7, 1)))
    assert not torch.equal(first, support.sample(6, 11, generator(5, 7, 2)))
    assert support.sample(0, 11, generator(5, 7, 1)).shape == (0, 11)


def test_stratified_puts_one_point_into_every_interval():
    for rows in (1, 2, 3, 7, 64):
        for step in range(50):
            points = stratified(rows, generator(0, step, 0))
            assert ((points >= 0) & (points < 1)).all()
            assert (points * rows).long().unique().numel() == rows


def test_atomic_roar_reveals_a_uniform_number_of_positions_in_every_row():
    rows, length, calls = 4, 6, 3000
    gamma_CBL = many(Roar(), calls, rows, length)
    assert set(gamma_CBL.unique().tolist()) == {0.0, math.inf}
    revealed_CB = gamma_CBL.isinf().sum(-1)
    for row in range(rows):
        count_K = torch.bincount(revealed_CB[:, row], minlength=length + 1)
        assert count_K[length] == 0, "something is always left to predict"
        chi_square = ((count_K[:length] - calls / length) ** 2 / (calls / length)).sum()
        assert chi_square < 20.5, "0.999 quantile with 5 degrees of freedom"


def test_roar_reveals_every_subset_of_a_size_equally_often():
    gamma_CBL = many(Roar(), 4000, 1, 4)[:, 0]
    pairs = gamma_CBL[gamma_CBL.isinf().sum(-1) == 2].isinf().long()
    codes = (pairs * torch.tensor([1, 2, 4, 8])).sum(-1)
    count = torch.bincount(codes)[[3, 5, 6, 9, 10, 12]].double()
    assert count.sum() == len(pairs)
    assert ((count - count.mean()) ** 2 / count.mean()).sum() < 20.5


def test_smoothed_roar_is_uniform_near_both_endpoints():
    support = Roar(gamma_min=2.0, c=0.8, gamma_max=100.0)
    gamma_N = many(support, 20, 8, 25).flatten()
    low_N, high_N = gamma_N[gamma_N < 10], gamma_N[gamma_N >= 10]
    assert ks_distance(low_N, lambda x: min(max(x / 2, 0), 1)) < critical(len(low_N))
    assert ks_distance(high_N, lambda x: min(max((x - 80) / 20, 0), 1)) < critical(len(high_N))


def test_papers_finite_stand_in_has_two_values():
    gamma = Roar(gamma_max=100.0).sample(8, 16, generator(0, 0, 0))
    assert set(gamma.unique().tolist()) == {0.0, 100.0}


def test_smoothing_keeps_the_revealed_subset_of_the_atomic_draw():
    atomic = Roar().sample(8, 16, generator(0, 0, 0))
    smooth = Roar(gamma_min=1.0, c=0.8, gamma_max=100.0).sample(8, 16, generator(0, 0, 0))
    assert torch.equal(atomic.isinf(), smooth > 1)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_lognormal_has_a_normal_logarithm(per):
    support = LogNormal(mu=1.4, sigma=0.55, per=per)
    law = NormalDist(1.4, 0.55)
    gamma_CBL = many(support, 1500, 2, 3)
    for row in range(2):
        log_N = gamma_CBL[:, row, 1].log()
        assert ks_distance(log_N, law.cdf) < critical(len(log_N))
    shared = (gamma_CBL == gamma_CBL[:, :, :1]).all()
    assert shared if per == "sequence" else not shared


def test_lognormal_clamps_its_upper_tail():
    gamma = many(LogNormal(mu=3.0, sigma=1.0, per="token", gamma_max=40.0), 10, 8, 32)
    free = many(LogNormal(mu=3.0, sigma=1.0, per="token"), 10, 8, 32)
    assert gamma.max() == 40
    assert torch.equal(gamma, free.clamp(max=40.0))


def test_information_is_uniform_in_nats_and_one_snr_a_row():
    gamma = many(InformationUniform(profile=MEASURED, gamma_max=5.0), 200, 7, 3)
    assert (gamma == gamma[..., :1]).all()
    # 3 nats lie below SNR 1, of the fourth nat half lies between 1 and 5.
    nats = torch.where(gamma < 1, 3 * gamma, 3 + (gamma - 1) / 8)[..., 0].flatten()
    assert ks_distance(nats, lambda n: min(max(n / 3.5, 0), 1)) < critical(len(nats))


def test_a_profile_that_ends_too_soon_is_refused():
    with pytest.raises(ValueError, match="beyond the measured profile, which ends at SNR 9"):
        InformationUniform(profile=MEASURED, gamma_max=10.0)


@pytest.mark.parametrize("gamma_max", [0.0, -5.0, math.nan])
def test_information_needs_a_positive_end(gamma_max):
    with pytest.raises(ValueError, match="gamma_max must be above 0"):
        InformationUniform(profile=MEASURED, gamma_max=gamma_max)


def test_lognormal_without_spread_is_a_constant():
    gamma = LogNormal(mu=math.log(5.0), sigma=0.0).sample(3, 4, generator(0, 0, 0))
    torch.testing.assert_close(gamma, torch.full((3, 4), 5.0))


@pytest.mark.parametrize("share", [0.25, 0.3])
def test_mixed_rows_are_roar_rows_at_the_stated_share(share):
    rows, calls = 4, 3000
    gamma_CBL = many(Mixed(roar_share=share), calls, rows, 5)
    roar_CB = ~((gamma_CBL > 0) & gamma_CBL.isfinite()).any(-1)
    whole = ((gamma_CBL == 0) | gamma_CBL.isinf()).all(-1)
    assert torch.equal(roar_CB, whole), "a row is one branch or the other"
    assert set(roar_CB.sum(1).tolist()) <= {math.floor(rows * share), math.ceil(rows * share)}
    sigma = math.sqrt(share * (1 - share) / calls)
    for row in range(rows):
        assert abs(roar_CB[:, row].double().mean() - share) < 3.5 * sigma


def test_mixed_of_one_branch_alone_is_that_branch():
    gamma = many(Mixed(roar_share=1.0), 20, 4, 5)
    assert ((gamma == 0) | gamma.isinf()).all()
    gamma = many(Mixed(roar_share=0.0), 20, 4, 5)
    assert ((gamma > 0) & gamma.isfinite()).all()


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Roar, "gamma_min", -1.0),
        (Roar, "gamma_min", math.nan),
        (Roar, "gamma_min", math.inf),
        (Roar, "c", 0.0),
        (Roar, "c", 1.1),
        (Roar, "gamma_max", 0.0),
        (Roar, "gamma_max", math.nan),
        (LogNormal, "mu", math.inf),
        (LogNormal, "sigma", -0.1),
        (LogNormal, "per", "row"),
        (LogNormal, "gamma_max", 0.0),
        (Mixed, "roar_share", 1.5),
        (Mixed, "roar_share", math.nan),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(kind, field, value):
    with pytest.raises(ValueError, match=rf"^{field} must be .*{value}"):
        kind(**{field: value})


@pytest.mark.parametrize(
    "support",
    [*SUPPORTS, Roar(gamma_min=0.5), Roar(gamma_max=30.0), Mixed(roar_share=0.7)],
    ids=repr,
)
def test_shares_are_those_of_the_draws(support):
    gamma = many(support, 200, 16, 7)
    shares = support.shares(7)
    assert gamma.isfinite().double().mean() == pytest.approx(shares.predicted, abs=0.02)
    seen = (gamma > 0) & gamma.isfinite()
    assert seen.double().mean() == pytest.approx(shares.evidence, abs=0.02)
