"""The yardstick itself: Bayes' rule with the Gaussian density written out.

Shapes: B rows, S sequences, L positions, V tokens, D table dimension.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsl.exact import ExactDenoiser
from dsl.state import State
from tests.dsl.laws import Law, cyclic, random_law, two_bits

LAW = random_law(tokens=4, length=3, dim=2, seed=1)
SNRS = st.sampled_from([0.0, 1e-6, 0.1, 1.0, 7.0, 90.0, math.inf])


def observed(law: Law, tokens_BL: Tensor, gamma_BL: Tensor, seed: int) -> State:
    """``tokens_BL`` through the channel; written without the code under test's help."""
    generator = torch.Generator().manual_seed(seed)
    x_BLD = law.table_VD[tokens_BL]
    eps_BLD = torch.randn(x_BLD.shape, generator=generator, dtype=torch.float64)
    soft_BL1 = gamma_BL.masked_fill(gamma_BL.isinf(), 0)[:, :, None]
    return State(
        tokens_BL=tokens_BL.masked_fill(gamma_BL.isfinite(), 0),
        z_BLD=soft_BL1 * x_BLD + soft_BL1.sqrt() * eps_BLD,
        gamma_BL=gamma_BL,
        frozen_BL=torch.zeros_like(tokens_BL, dtype=torch.bool),
    )


def bayes(law: Law, state: State) -> Tensor:
    """``[B, L, V]`` posterior, one row and one sequence at a time, from the density of
    ``z ~ N(gamma x, gamma I)``."""
    rows, length = state.gamma_BL.shape
    probs_BLV = torch.zeros(rows, length, len(law.table_VD), dtype=torch.float64)
    for row in range(rows):
        log_joint = []
        for sequence, p in zip(law.sequences_SL, law.p_S, strict=True):
            total = math.log(p) if p > 0 else -math.inf
            for i, token in enumerate(sequence.tolist()):
                gamma = state.gamma_BL[row, i].item()
                if math.isinf(gamma):
                    total += 0.0 if state.tokens_BL[row, i] == token else -math.inf
                elif gamma > 0:
                    gap_D = state.z_BLD[row, i] - gamma * law.table_VD[token]
                    total += -gap_D.square().sum().item() / (2 * gamma)
                    total += -len(gap_D) / 2 * math.log(2 * math.pi * gamma)
            log_joint.append(total)
        weights_S = torch.tensor(log_joint, dtype=torch.float64).softmax(0)
        for sequence, weight in zip(law.sequences_SL, weights_S, strict=True):
            probs_BLV[row, torch.arange(length), sequence] += weight
    return probs_BLV


@settings(max_examples=60)
@given(
    gamma=st.lists(SNRS, min_size=6, max_size=6),
    text=st.integers(0, 4**3 - 1),
    seed=st.integers(0, 2**32),
)
def test_equals_bayes_rule_at_mixed_snrs(gamma: list[float], text: int, seed: int) -> None:
    tokens_BL = LAW.sequences_SL[[text, (text * 7) % 64]]
    gamma_BL = torch.tensor(gamma, dtype=torch.float64).view(2, 3)
    state = observed(LAW, tokens_BL, gamma_BL, seed)
    answer = LAW.denoiser()(state)
    torch.testing.assert_close(answer.log_probs().exp(), bayes(LAW, state), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(answer.mean(), answer.log_probs().exp() @ LAW.table_VD)


def test_the_density_does_not_see_the_snr() -> None:
    """On the unit sphere the same z means the same, whatever gamma is said to have made it; off
    it the very same density disagrees with itself (003 A.1)."""
    state = observed(LAW, LAW.draw(4, seed=2), torch.full((4, 3), 2.0).double(), seed=3)
    claimed = replace(state, gamma_BL=torch.rand(4, 3, dtype=torch.float64) * 30 + 0.01)
    torch.testing.assert_close(bayes(LAW, claimed), bayes(LAW, state), atol=1e-12, rtol=1e-9)
    assert torch.equal(LAW.denoiser()(claimed).log_probs(), LAW.denoiser()(state).log_probs())
    stretched = replace(LAW, table_VD=LAW.table_VD * torch.tensor([[1.0], [2], [1], [0.5]]))
    assert (bayes(stretched, claimed) - bayes(stretched, state)).abs().max() > 0.1


def revealed(law: Law, tokens_BL: Tensor, known_BL: Tensor) -> State:
    gamma_BL = torch.where(known_BL, math.inf, 0.0)
    return State.from_tokens(law.table_VD, tokens_BL, known_BL, gamma_BL)


def test_a_contradiction_leaves_the_nearest_sequences() -> None:
    """ABD begins no rotation of ABCDE; the cosines decide, as evidence does at a high SNR."""
    law = cyclic(5)
    text_BL = torch.tensor([[0, 1, 3, 0, 0]])
    known_BL = torch.tensor([[True, True, True, False, False]])
    limit = law.denoiser()(revealed(law, text_BL, known_BL)).log_probs().exp()
    assert limit.isfinite().all()
    likeness_S = (law.table_VD[text_BL[0, :3]] * law.table_VD[law.sequences_SL[:, :3]]).sum((1, 2))
    best_S = (likeness_S - likeness_S.max()).abs() < 1e-12
    for position in (3, 4):
        expected_V = torch.zeros(5).double()
        expected_V[law.sequences_SL[best_S, position]] = 1 / int(best_S.sum())
        torch.testing.assert_close(limit[0, position], expected_V)
    soft = State.from_tokens(
        law.table_VD, text_BL, torch.zeros_like(known_BL), torch.where(known_BL, 1e6, 0.0)
    )
    torch.testing.assert_close(
        limit[:, 3:], law.denoiser()(soft).log_probs().exp()[:, 3:], atol=1e-6, rtol=0
    )


def test_ties_in_a_contradiction_are_shared_by_weight() -> None:
    law = two_bits()
    denoiser = ExactDenoiser(
        law.table_VD, torch.tensor([[0, 0, 0], [1, 1, 1]]), torch.tensor([3.0, 1.0])
    )
    state = State.from_tokens(
        law.table_VD, torch.tensor([[0, 1, 0]]), torch.tensor([[True, True, False]])
    )
    probs_V = denoiser(state).log_probs().exp()[0, 2]
    torch.testing.assert_close(probs_V, torch.tensor([0.75, 0.25], dtype=torch.float64))


def test_weight_zero_is_outside_the_law() -> None:
    law = two_bits()
    denoiser = ExactDenoiser(
        law.table_VD, torch.tensor([[0, 0], [0, 1], [1, 1]]), torch.tensor([1.0, 0.0, 2.0])
    )
    blank = State.masked(1, 2, 1, dtype=torch.float64)
    prior_LV = torch.tensor([[1 / 3, 2 / 3]] * 2, dtype=torch.float64)
    torch.testing.assert_close(denoiser(blank).log_probs().exp()[0], prior_LV)
    # (0, 1) agrees with a sequence of weight zero only: a contradiction, not a match.
    state = revealed(law, torch.tensor([[0, 1]]), torch.tensor([[True, True]]))
    assert denoiser(state).weights_BS[0].tolist() == pytest.approx([1 / 3, 0, 2 / 3])
    # Evidence for it counts for nothing.
    soft = State.from_tokens(
        law.table_VD,
        torch.tensor([[0, 1]]),
        torch.zeros(1, 2).bool(),
        torch.tensor([[1e8, 1e8]]),
    )
    assert denoiser(soft).log_probs().isfinite().all()


@pytest.mark.parametrize("weights", [[1.0, -1], [1], [math.nan, 1], [math.inf, 1], [0, 0]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    law = two_bits()
    with pytest.raises(ValueError, match="weights"):
        ExactDenoiser(law.table_VD, law.sequences_SL, torch.tensor(weights))


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_weights_of_any_scale_are_normalised(scale: float) -> None:
    law = cyclic(3)
    weights_S = scale * torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    small = ExactDenoiser(law.table_VD.float(), law.sequences_SL, weights_S)
    found_B = small(State.masked(1, 3, 2)).log_probs()[0, 0].exp().sort().values
    torch.testing.assert_close(found_B, torch.tensor([0.25, 0.25, 0.5]))


def test_texts_that_do_not_fit_are_refused() -> None:
    law = two_bits()
    for outside in (-1, 2):
        with pytest.raises(ValueError, match=r"outside \[0, 2\)"):
            ExactDenoiser(law.table_VD, torch.tensor([[0, outside]]))
    with pytest.raises(ValueError, match="texts of 2 tokens, the state of 3"):
        law.denoiser()(State.masked(1, 3, 1))


def test_keeps_the_precision_of_its_table() -> None:
    state = observed(LAW, LAW.draw(3, seed=4), torch.full((3, 3), 1.5).double(), seed=5)
    double = LAW.denoiser()(state)
    single = ExactDenoiser(LAW.table_VD.float(), LAW.sequences_SL, LAW.p_S)(state)
    assert double.log_probs().dtype == double.mean().dtype == torch.float64
    assert single.log_probs().dtype == single.mean().dtype == torch.float32
    error = (double.log_probs().exp() - bayes(LAW, state)).abs().max()
    assert error < 1e-13
    torch.testing.assert_close(single.log_probs(), double.log_probs().float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("gamma", [1e8, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_evidence_stays_a_probability(gamma: float, dtype: torch.dtype) -> None:
    tokens_BL = LAW.draw(16, seed=6)
    state = observed(LAW, tokens_BL, torch.full((16, 3), gamma).double(), seed=7)
    denoiser = ExactDenoiser(LAW.table_VD.to(dtype), LAW.sequences_SL, LAW.p_S)
    probs_BLV = denoiser(state).log_probs().exp()
    torch.testing.assert_close(probs_BLV.sum(-1), torch.ones(16, 3, dtype=dtype))
    if gamma > 1:
        assert torch.equal(probs_BLV.argmax(-1), tokens_BL)


def test_rows_do_not_see_each_other() -> None:
    """Bit for bit, which is what the sampling loop's keyed randomness rests on."""
    state = observed(LAW, LAW.draw(33, seed=8), torch.rand(33, 3).double() * 5, seed=9)
    whole = LAW.denoiser()(state)
    for rows_R in (torch.arange(5, 6), torch.arange(20, 33), torch.tensor([2, 30, 2])):
        part = LAW.denoiser()(state.rows(rows_R))
        assert torch.equal(part.log_probs(), whole.log_probs()[rows_R])
        assert torch.equal(part.mean(), whole.mean()[rows_R])


def test_with_rows_replaces_those_rows() -> None:
    denoiser = LAW.denoiser()
    old = observed(LAW, LAW.draw(4, seed=10), torch.full((4, 3), 1.0).double(), seed=11)
    new = observed(LAW, LAW.draw(4, seed=12), torch.full((4, 3), 1.0).double(), seed=13)
    rows_R = torch.tensor([3, 1])
    mixed = replace(old, z_BLD=old.z_BLD.clone())
    mixed.z_BLD[rows_R] = new.z_BLD[rows_R]
    merged = denoiser(old).with_rows(mixed, rows_R, denoiser(new.rows(rows_R)))
    assert torch.equal(merged.log_probs(), denoiser(mixed).log_probs())
