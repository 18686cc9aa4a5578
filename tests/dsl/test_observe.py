"""Known text is seen exactly as z = gamma x + sqrt(gamma) eps between the endpoints."""

import pytest
import torch
import torch.nn.functional as F

from dsl.channel import observe
from dsl.noise import Draws, generator
from dsl.state import State


@pytest.fixture
def table_VD():
    return F.normalize(torch.randn(7, 4, dtype=torch.float64, generator=generator(0, 0, 0)), dim=-1)


TOKENS_BL = torch.tensor([[3, 0, 6], [1, 1, 5]])
GAMMA_BL = torch.tensor([[0.0, 2.5, torch.inf], [torch.inf, 9.0, 0.0]])


def test_each_position_is_read_by_its_gamma(table_VD):
    state = observe(table_VD, TOKENS_BL, GAMMA_BL, generator(1, 2, 3))
    assert torch.equal(state.masked_BL, GAMMA_BL == 0)
    assert torch.equal(state.revealed_BL, GAMMA_BL.isinf())
    assert torch.equal(state.tokens_BL, torch.tensor([[0, 0, 6], [1, 0, 0]]))
    assert not state.frozen_BL.any()
    assert state.gamma_BL.dtype == state.z_BLD.dtype == torch.float64
    eps_ND = torch.randn(2, 4, dtype=torch.float64, generator=generator(1, 2, 3))
    expected_BLD = torch.zeros(2, 3, 4, dtype=torch.float64)
    expected_BLD[0, 1] = 2.5 * table_VD[0] + 2.5**0.5 * eps_ND[0]
    expected_BLD[1, 1] = 9.0 * table_VD[1] + 9.0**0.5 * eps_ND[1]
    assert torch.equal(state.z_BLD, expected_BLD)


def test_endpoints_agree_with_given_text_and_draw_nothing(table_VD):
    gamma_BL = torch.where(GAMMA_BL.isinf(), torch.inf, 0.0)
    source = generator(1, 2, 3)
    before = source.get_state()
    state = observe(table_VD, TOKENS_BL, gamma_BL, source)
    assert torch.equal(source.get_state(), before)
    given = State.from_tokens(
        table_VD, TOKENS_BL, torch.zeros_like(TOKENS_BL, dtype=torch.bool), gamma_BL
    )
    for name in ("tokens_BL", "z_BLD", "gamma_BL", "frozen_BL"):
        assert torch.equal(getattr(state, name), getattr(given, name)), name


@pytest.mark.parametrize("noise", [generator(0, 0, 1), Draws(1, 0, 0)], ids=["drawn", "keyed"])
def test_evidence_has_the_channels_mean_and_variance(table_VD, noise):
    gamma = 6.0
    tokens_BL = torch.full((200, 100), 4)
    state = observe(table_VD, tokens_BL, torch.full((200, 100), gamma), noise)
    z_ND = state.z_BLD.flatten(0, 1)
    stderr = (gamma / len(z_ND)) ** 0.5
    assert (z_ND.mean(0) - gamma * table_VD[4]).abs().max() < 4 * stderr
    assert (torch.cov(z_ND.T) - gamma * torch.eye(4)).abs().max() < 0.05 * gamma


def test_gradients_flow_into_the_rows_that_were_seen(table_VD):
    table_VD.requires_grad_()
    state = observe(table_VD, TOKENS_BL, GAMMA_BL, generator(1, 2, 3))
    state.z_BLD.sum().backward()
    expected_VD = torch.zeros_like(table_VD)
    expected_VD[0], expected_VD[1] = 2.5, 9.0
    assert torch.equal(table_VD.grad, expected_VD)


def test_equal_keys_give_equal_corruption(table_VD):
    states = [observe(table_VD, TOKENS_BL, GAMMA_BL, generator(1, 2, lane)) for lane in (3, 3, 4)]
    assert torch.equal(states[0].z_BLD, states[1].z_BLD)
    assert not torch.equal(states[0].z_BLD, states[2].z_BLD)
