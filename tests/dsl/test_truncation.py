"""Temperature and nucleus: what is kept, and that draws and means are sharpened alike.

Shapes: B rows, L positions, V tokens, N asked positions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsl import truncation
from dsl.channel import observe
from dsl.chunks import CHUNK_ELEMENTS
from dsl.paths import Masked, SecondOrder, SentenceSDE
from dsl.posterior import Posterior
from dsl.sampling import sample
from dsl.state import State
from dsl.truncation import Convention, Truncated
from tests.dsl.laws import (
    Law,
    Written,
    chi_square_p,
    cyclic,
    random_law,
    total_variation,
    total_variation_bound,
)

GPT2 = 50257
PROBS = torch.tensor([[0.05, 0.4, 0.25, 0.3], [0.95, 0.02, 0.02, 0.01]], dtype=torch.float64)


class Fixed:
    """A denoiser that always says the same."""

    def __init__(self, log_probs_V: Tensor) -> None:
        self.table_VD = F.normalize(torch.randn(len(log_probs_V), 3), dim=1)
        self.log_probs_V = log_probs_V
        self.answer: Written | None = None

    def __call__(self, state: State) -> Posterior:
        self.answer = Written(state, self.table_VD, self.log_probs_V[None])
        return self.answer


def zipf() -> Tensor:
    """GPT-2's number of tokens, float32 log-probabilities with a long tail."""
    return (-1.1 * torch.arange(1, GPT2 + 1, dtype=torch.float32).log()).log_softmax(0)


def sharpened(**options: Any) -> Tensor:
    law = cyclic(4)
    return Truncated(law.denoiser(), **options).cut(PROBS.log()).softmax(-1)


def test_keep_holds_the_token_that_crosses_p() -> None:
    expected = torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7], [1.0, 0.0, 0.0, 0.0]]).double()
    torch.testing.assert_close(sharpened(nucleus=0.6), expected)


def test_drop_leaves_out_the_token_that_crosses_p_but_never_the_first() -> None:
    expected = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).double()
    torch.testing.assert_close(sharpened(nucleus=0.6, convention="drop"), expected)
    torch.testing.assert_close(sharpened(nucleus=0.01, convention="drop"), expected)


def test_temperature_comes_before_the_nucleus() -> None:
    hot = PROBS.sqrt() / PROBS.sqrt().sum(1, keepdim=True)
    torch.testing.assert_close(sharpened(temperature=2.0), hot)
    kept = sharpened(temperature=2.0, nucleus=0.85)
    assert (kept[0] > 0).tolist() == [False, True, True, True]
    assert (kept[1] > 0).tolist() == [True, True, True, False]


def test_no_sharpening_changes_nothing() -> None:
    law = random_law(tokens=4, length=2, dim=2, seed=0)
    state = observe(law.table_VD, law.draw(3, 0), torch.full((3, 2), 2.0), torch.Generator())
    assert torch.equal(
        Truncated(law.denoiser())(state).log_probs(), law.denoiser()(state).log_probs()
    )


SHARPER = [{"temperature": 0.5}, {"temperature": 1.5, "nucleus": 0.7}, {"nucleus": 0.6}]


def independent(options: dict[str, Any]) -> tuple[Law, Law]:
    """A law of independent tokens, and the one in which each token's law is sharpened."""
    law = random_law(tokens=4, length=1, dim=3, seed=2)
    cut_1V = Truncated(law.denoiser(), **options).cut(law.p_S[None].log())
    return tuple(
        Law(
            table_VD=law.table_VD,
            sequences_SL=torch.cartesian_prod(torch.arange(4), torch.arange(4)),
            p_S=torch.outer(p_V, p_V).flatten(),
        )
        for p_V in (law.p_S, cut_1V[0].softmax(-1))
    )


@pytest.mark.parametrize("options", SHARPER, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0, 30.0, torch.inf])
def test_evidence_is_weighed_as_by_the_sharpened_law(options: dict[str, Any], gamma: float) -> None:
    """Where tokens are independent, sharpening gives the exact posterior of the sharpened law."""
    plain, sharper = independent(options)
    gamma_BL = torch.tensor([[gamma, 1.0]]).expand(50, 2)
    state = observe(plain.table_VD, sharper.draw(50, 0), gamma_BL, torch.Generator().manual_seed(1))
    found = Truncated(plain.denoiser(), **options)(state)
    expected = sharper.denoiser()(state)
    torch.testing.assert_close(found.log_probs().exp(), expected.log_probs().exp())
    torch.testing.assert_close(found.mean(), expected.mean())


@pytest.mark.parametrize("options", SHARPER, ids=str)
def test_a_path_through_soft_evidence_draws_from_the_sharpened_law(options: dict[str, Any]) -> None:
    plain, sharper = independent(options)
    path = SecondOrder(SentenceSDE(gamma_max=20.0, grid="log"))
    denoiser, start = Truncated(plain.denoiser(), **options), State.masked(4000, 2, 3)
    made = sample(denoiser, path, start, budget=64, seed=0)
    assert total_variation(sharper, made.tokens_BL) < total_variation_bound(sharper, 4000)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"temperature": 1e-38},
        {"temperature": 1e38},
        {"nucleus": 0.0},
        {"nucleus": 1.1},
        {"convention": "cut"},
    ],
)
def test_bad_options_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Truncated(cyclic(4).denoiser(), **options)


@pytest.mark.parametrize("temperature", [1e-37, 1e37])
def test_extreme_temperatures_are_a_law_in_float32(temperature: float) -> None:
    """Also of scores that are off by a constant."""
    off_N1 = torch.tensor([[0.0], [60.0], [-60.0]])
    for log_probs_V in (zipf(), torch.full((GPT2,), 1 / GPT2).log()):
        sharp = Truncated(Fixed(log_probs_V), temperature=temperature)
        for total in sharp.cut(log_probs_V + off_N1).exp().sum(-1).tolist():
            assert total == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("convention", ["keep", "drop"])
@pytest.mark.parametrize("gamma", [0.0, torch.inf])
def test_a_row_is_cut_alike_beside_evidence(gamma: float, convention: Convention) -> None:
    """Ten tokens, equally likely: where a sum of tenths passes p, its last bit decides."""
    fixed = Fixed(torch.full((10,), 0.1, dtype=torch.float64).log())
    zero_BL, gamma_BL = torch.zeros(2, 1).long(), torch.tensor([[gamma], [3.0]])
    both = State.from_tokens(fixed.table_VD, zero_BL, zero_BL, gamma_BL)
    alone = both.rows(torch.tensor([0]))
    first_N, every_N = torch.zeros(10).long(), torch.arange(10)
    for tenths in range(1, 10):
        sharp = Truncated(fixed, nucleus=tenths / 10, convention=convention)
        whole, part = (sharp(state).confidence_at(first_N, every_N) for state in (both, alone))
        assert torch.equal(whole, part)


def test_a_nucleus_of_a_long_tail_is_cut_in_float64() -> None:
    log_probs_V = zipf()
    exact_V = log_probs_V.double().exp().cumsum(0)
    for p in (0.9, 0.999):
        kept_V = Truncated(Fixed(log_probs_V), nucleus=p).cut(log_probs_V[None])[0].isfinite()
        assert int(kept_V.sum()) == int((exact_V < p).sum()) + 1


def test_draws_are_exact_in_distribution() -> None:
    """Chi-square over a GPT-2 sized vocabulary."""
    draws = 1000
    denoiser = Truncated(Fixed(zipf()), nucleus=0.9)
    posterior = denoiser(State.masked(1, draws, 3))
    generator = torch.Generator().manual_seed(0)
    uniform_N = torch.rand(draws, dtype=torch.float64, generator=generator)
    tokens_N = posterior.draw(torch.arange(draws), uniform_N)
    p_V = denoiser.cut(zipf()[None].double())[0].softmax(-1)
    assert chi_square_p(torch.bincount(tokens_N, minlength=GPT2), p_V) > 1e-3


def test_work_is_chunked_by_positions() -> None:
    inner = Fixed(zipf())
    posterior = Truncated(inner, nucleus=0.9)(State.masked(2, 200, 3))
    posterior.mean()
    assert inner.answer is not None
    assert max(inner.answer.asked) * GPT2 <= CHUNK_ELEMENTS


def test_mean_and_entropy_are_those_of_the_sharpened_law() -> None:
    law = random_law(tokens=5, length=3, dim=2, seed=1)
    denoiser = Truncated(law.denoiser(), temperature=0.7, nucleus=0.8)
    known_BL = torch.tensor([[True, False, False]])
    state = State.from_tokens(law.table_VD, torch.tensor([[2, 0, 0]]), known_BL)
    posterior = denoiser(state)
    probs_BLV = posterior.log_probs().exp()
    assert torch.equal(probs_BLV[0, 0], F.one_hot(torch.tensor(2), 5).double())
    assert (probs_BLV[0, 1:] == 0).any()
    torch.testing.assert_close(posterior.mean(), probs_BLV @ law.table_VD)
    entropy_N = torch.special.entr(probs_BLV).sum(-1).flatten()
    torch.testing.assert_close(posterior.entropy_at(torch.arange(3)), entropy_N)


@pytest.mark.parametrize("path", [Masked(), SentenceSDE(gamma_max=20.0)], ids=repr)
def test_every_path_samples_the_sharpened_denoiser(path: Any) -> None:
    """A temperature takes rare texts out of any stage, of draws and of drifts."""
    law = random_law(tokens=3, length=2, dim=2, seed=4)
    mode_L = law.sequences_SL[law.p_S.argmax()]
    shares = [
        (made.tokens_BL == mode_L).all(1).double().mean().item()
        for made in (
            sample(denoiser, path, State.masked(200, 2, 2), budget=16, seed=0)
            for denoiser in (law.denoiser(), Truncated(law.denoiser(), 0.2))
        )
    ]
    assert shares[1] > shares[0] + 0.2


@pytest.mark.parametrize("convention", ["keep", "drop"])
@pytest.mark.parametrize("first", [1, 3, 7, 1024])
def test_the_nucleus_is_that_of_a_stable_sort(
    convention: Any, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tokens are summed up at first, and where some are equally likely at the cut."""
    monkeypatch.setattr(truncation, "FIRST", first)
    generator = torch.Generator().manual_seed(first)
    # Few different values make many ties; the last rows are all ties, and one sure token.
    scores_NV = torch.randint(4, (300, 40), generator=generator).float()
    scores_NV[-1], scores_NV[-2] = 0.0, torch.eye(40)[7] * 50
    log_probs_NV = scores_NV.log_softmax(-1)
    for p in (0.05, 0.3, 0.5, 0.9, 0.999):
        sorted_NV, token_NV = log_probs_NV.sort(dim=-1, descending=True, stable=True)
        total_NV = sorted_NV.double().exp().cumsum(-1)
        inside_NV = total_NV <= p if convention == "drop" else total_NV.roll(1, -1) < p
        inside_NV[:, 0] = True
        expected_NV = torch.empty_like(inside_NV).scatter_(-1, token_NV, inside_NV)
        found_NV = Truncated(None, 1.0, p, convention).cut(log_probs_NV)
        assert torch.equal(found_NV.isfinite(), expected_NV)
