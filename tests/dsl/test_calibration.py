"""Reliability in closed form, and denoisers that are calibrated or wrong by construction.

Shapes: B rows, L positions, V tokens, N positions.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsl.calibration import calibration, reliability
from dsl.state import State
from dsl.truncation import Truncated
from tests.dsl.laws import random_law

LAW = random_law(tokens=3, length=4, dim=2, seed=6)
GAMMAS = [0.0, 0.5, 2.0, 10.0]


def test_ece_by_hand() -> None:
    confidence_N = torch.tensor([0.95, 0.91, 0.55, 0.51, 0.59, 0.6], dtype=torch.float64)
    right_N = torch.tensor([True, False, True, True, False, True])
    table = reliability(confidence_N, right_N)
    # (0.5, 0.6] holds four: edges belong to the bin below them.
    assert table.count_K.tolist() == [0, 0, 0, 0, 0, 4, 0, 0, 0, 2]
    assert table.right_K.tolist() == [0, 0, 0, 0, 0, 3, 0, 0, 0, 1]
    assert table.confidence_K[[5, 9]].tolist() == pytest.approx([2.25, 1.86])
    assert table.ece == pytest.approx(4 / 6 * abs(0.75 - 0.5625) + 2 / 6 * abs(0.5 - 0.93))


def test_ece_of_extremes() -> None:
    sure = torch.ones(8)
    assert reliability(sure, torch.ones(8).bool()).ece == 0
    assert reliability(sure, torch.zeros(8).bool()).ece == 1
    assert reliability(sure, torch.arange(8) < 4).ece == 0.5
    assert reliability(torch.zeros(2), torch.zeros(2).bool()).count_K[0] == 2
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="confidence"):
            reliability(torch.tensor([wrong]), torch.tensor([True]))


def test_nothing_counts_as_nothing() -> None:
    found = reliability(torch.zeros(0), torch.zeros(0), bins=3)
    for counts_K in (found.count_K, found.confidence_K, found.right_K):
        assert torch.equal(counts_K, torch.zeros(3, dtype=torch.float64))
        assert counts_K.dtype == torch.float64


def test_batches_add_up() -> None:
    torch.manual_seed(0)
    confidence_N, right_N = torch.rand(90), torch.rand(90) < 0.5
    whole = reliability(confidence_N, right_N, bins=7)
    parts = reliability(confidence_N[:40], right_N[:40], bins=7) + reliability(
        confidence_N[40:], right_N[40:], bins=7
    )
    assert torch.equal(parts.count_K, whole.count_K)
    torch.testing.assert_close(parts.confidence_K, whole.confidence_K)
    assert parts.ece == pytest.approx(whole.ece)


def bound(count_K: Tensor) -> float:
    """What the ECE of a calibrated denoiser exceeds only beyond four standard errors: at most
    ``sqrt(n_k) / 2`` per bin. Positions of one row are not independent, hence the factor of L."""
    return (4 * (4 * count_K).sqrt() / 2).sum().item() / count_K.sum().item()


def test_the_exact_posterior_is_calibrated() -> None:
    tables = calibration(LAW.denoiser(), LAW.draw(6_000, seed=0), gammas=GAMMAS, seed=1)
    assert list(tables) == GAMMAS
    for table in tables.values():
        assert table.count_K.sum() == 6_000 * 4
        assert table.ece < bound(table.count_K)
    accuracy = [table.right_K.sum().item() for table in tables.values()]
    assert accuracy == sorted(accuracy)
    assert accuracy[-1] > 0.95 * 6_000 * 4


def test_overconfidence_is_seen_where_there_is_doubt() -> None:
    tokens_BL = LAW.draw(6_000, seed=0)
    cooled = calibration(
        Truncated(LAW.denoiser(), temperature=1 / 3), tokens_BL, gammas=GAMMAS, seed=1
    )
    for gamma in GAMMAS[:3]:
        assert cooled[gamma].ece > bound(cooled[gamma].count_K)
        gap = cooled[gamma].confidence_K.sum() - cooled[gamma].right_K.sum()
        assert gap > 0


def test_accuracy_at_no_evidence_is_the_mode_of_the_prior() -> None:
    tokens_BL = LAW.draw(50, seed=2)
    table = calibration(LAW.denoiser(), tokens_BL, gammas=[0.0], seed=0)[0.0]
    prior_LV = LAW.denoiser()(State.masked(1, 4, 2)).log_probs()[0].exp()
    assert table.right_K.sum() == (tokens_BL == prior_LV.argmax(1)).sum()
    assert table.confidence_K.sum().item() == pytest.approx(50 * prior_LV.amax(1).sum().item())


def test_rows_do_not_depend_on_the_batch() -> None:
    tokens_BL, denoiser = LAW.draw(20, seed=3), LAW.denoiser()
    whole = calibration(denoiser, tokens_BL, gammas=[1.0], seed=5)[1.0]
    parts = [
        calibration(denoiser, tokens_BL[rows], gammas=[1.0], seed=5, first_row=rows.start)[1.0]
        for rows in (slice(0, 13), slice(13, 20))
    ]
    joined = parts[0] + parts[1]
    assert torch.equal(joined.count_K, whole.count_K)
    assert torch.equal(joined.right_K, whole.right_K)
    torch.testing.assert_close(joined.confidence_K, whole.confidence_K)


@pytest.mark.parametrize("gamma", [-1.0, math.inf, math.nan])
def test_gammas_that_leave_nothing_to_predict_are_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be finite"):
        calibration(LAW.denoiser(), LAW.draw(2, seed=0), gammas=[gamma], seed=0)
