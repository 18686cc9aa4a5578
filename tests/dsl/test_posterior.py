"""Answers are one-hot where the token is known, computed where asked, and drawn exactly.

Shapes: N asked positions, V tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dsl
from dsl import chunks
from dsl.state import State
from tests.dsl.laws import Written, chi_square_p, ring

ONE_BELOW = 1 - 2**-53  # the largest float64 below 1
GPT2 = 50257


def given(log_probs_NV: Tensor, state: State | None = None) -> Written:
    positions, tokens = log_probs_NV.shape
    table_VD = F.normalize(torch.randn(tokens, 3, dtype=torch.float64), dim=1)
    return Written(state or State.masked(1, positions, 3), table_VD, log_probs_NV)


def repeated(log_probs_V: Tensor, positions: int) -> Written:
    return given(log_probs_V.expand(positions, -1))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_one_hot_where_revealed() -> None:
    gamma_BL = torch.tensor([[0.0, math.inf, 2.0]])
    table_VD = torch.eye(4)
    tokens_BL = torch.tensor([[3, 2, 1]])
    state = State.from_tokens(table_VD, tokens_BL, torch.zeros(1, 3).bool(), gamma_BL)
    log_probs_NV = torch.randn(3, 4).log_softmax(-1)
    answer = Written(state, table_VD, log_probs_NV)
    expected_BLV = log_probs_NV.clone()[None]
    expected_BLV[0, 1] = torch.tensor([-math.inf, -math.inf, 0, -math.inf])
    assert torch.equal(answer.log_probs(), expected_BLV)
    torch.testing.assert_close(answer.mean(), expected_BLV.exp() @ table_VD)
    assert torch.equal(answer.mean()[0, 1], table_VD[2])
    drawn = answer.draw(torch.tensor([1, 1]), torch.tensor([0.0, ONE_BELOW], dtype=torch.float64))
    assert drawn.tolist() == [2, 2]


def test_mean_is_the_expectation_of_the_table() -> None:
    answer = given(torch.randn(6, 5).double().log_softmax(-1))
    torch.testing.assert_close(answer.mean(), answer.log_probs().exp() @ answer.table_VD)
    at_N = torch.tensor([4, 0, 4])
    torch.testing.assert_close(answer.mean_at(at_N), answer.mean()[0, at_N])
    assert torch.equal(answer.log_probs_at(at_N), answer.log_probs()[0, at_N])


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = given(torch.randn(7, 5).double().log_softmax(-1))
    at_N, uniform_N = torch.arange(7), torch.rand(7, dtype=torch.float64)
    mean_ND, tokens_N = answer.mean_at(at_N), answer.draw(at_N, uniform_N)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 11)  # two positions a chunk
    answer.asked.clear()
    torch.testing.assert_close(answer.mean_at(at_N), mean_ND)
    assert torch.equal(answer.draw(at_N, uniform_N), tokens_N)
    assert answer.asked == [2, 2, 2, 1] * 2


def test_a_batch_without_rows_has_an_empty_answer() -> None:
    table_VD = ring(3)
    chain_VV = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    texts_NL = torch.zeros(1, 4, dtype=torch.int64)
    for denoiser in (
        dsl.ExactDenoiser(table_VD, texts_NL),
        *(dsl.ChainDenoiser.fit(table_VD, texts_NL, order) for order in (1, 2, 3)),
        dsl.HiddenChainDenoiser(table_VD, chain_VV[0], chain_VV, chain_VV),
    ):
        posterior = denoiser(State.masked(0, 4, 2))
        assert posterior.log_probs().shape == (0, 4, 3)
        assert posterior.mean().shape == (0, 4, 2)


def test_mean_of_nothing_asked_is_empty() -> None:
    answer = given(torch.randn(3, 5).log_softmax(-1))
    assert answer.mean_at(torch.tensor([], dtype=torch.int64)).shape == (0, 3)
    assert answer.asked == []


def test_draws_follow_a_large_vocabulary() -> None:
    """Zipf's law over GPT-2's vocabulary in float32: chi-square, fixed seed."""
    log_probs_V = (-torch.arange(1, GPT2 + 1).log()).log_softmax(-1)
    order_V = torch.randperm(GPT2)
    rows = 6_000
    answer = repeated(log_probs_V[order_V], rows)
    drawn_N = answer.draw(torch.arange(rows), torch.rand(rows, dtype=torch.float64))
    counts_V = torch.bincount(drawn_N, minlength=GPT2)
    assert chi_square_p(counts_V, log_probs_V[order_V].double().exp()) > 1e-4


def test_draws_invert_the_cdf_exactly() -> None:
    """Evenly spaced uniforms must reproduce every cumulative probability to within one draw;
    two fifths of the mass lie on 50,000 tokens of less than 2^-16."""
    logits_V = torch.zeros(GPT2)
    logits_V[::100] = 5.0
    log_probs_V = logits_V.log_softmax(-1)
    rows = 3_000
    uniform_N = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    drawn_N = repeated(log_probs_V, rows).draw(torch.arange(rows), uniform_N)
    cdf_V = torch.bincount(drawn_N, minlength=GPT2).cumsum(0) / rows
    exact_V = log_probs_V.double().exp().cumsum(0)
    assert (cdf_V - exact_V / exact_V[-1]).abs().max() <= 1.01 / rows
    assert drawn_N.diff().min() >= 0


def test_the_rarest_tokens_can_be_drawn() -> None:
    """Fifty thousand tokens of 1e-9 behind a sure one: below the spacing of float32 sums near 1,
    where a coarser sum would merge them by the dozen."""
    log_probs_V = torch.full((GPT2,), math.log(1e-9))
    log_probs_V[0] = math.log1p(-(GPT2 - 1) * 1e-9)
    edges_V = log_probs_V.double().exp().cumsum(0)
    wanted_N = torch.randint(1, GPT2, (200,))
    middle_N = (edges_V[wanted_N - 1] + edges_V[wanted_N]) / 2 / edges_V[-1]
    assert torch.equal(repeated(log_probs_V, 200).draw(torch.arange(200), middle_N), wanted_N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uniform", [0.0, 2**-53, ONE_BELOW])
def test_extreme_uniforms_draw_possible_tokens(uniform: float, dtype: torch.dtype) -> None:
    """Neither end of [0, 1) may reach a token of probability zero, wherever those lie."""
    positions, tokens = 400, 60
    logits_NV = 4 * torch.randn(positions, tokens, dtype=dtype)
    impossible_NV = torch.rand(positions, tokens) < 0.5
    impossible_NV[: positions // 2, [0, -1]] = True
    impossible_NV[:, 30] = False
    log_probs_NV = logits_NV.masked_fill(impossible_NV, -torch.inf).log_softmax(-1)
    answer = given(log_probs_NV)
    uniform_N = torch.full((positions,), uniform, dtype=torch.float64)
    drawn_N = answer.draw(torch.arange(positions), uniform_N)
    assert log_probs_NV[torch.arange(positions), drawn_N].isfinite().all()
    if uniform == 0:
        assert torch.equal(drawn_N, log_probs_NV.isfinite().int().argmax(1))
