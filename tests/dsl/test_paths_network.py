"""Every path on a small network: what an exact law cannot show.

Shapes: B rows, L positions, V tokens, D table dimension.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiTConfig
from dsl.noise import Draws
from dsl.paths import AnyPath, Clock, Order
from dsl.paths.token_sde import jvp
from dsl.sampling import sample
from dsl.state import State
from dsl.truncation import Truncated
from tests.dsl.walks import PATHS

TOKENS, LENGTH, DIM = 23, 6, 4


@pytest.fixture(scope="module")
def network() -> Denoiser:
    torch.manual_seed(0)
    backbone = DiTConfig(tokens=TOKENS, width=16, blocks=2, heads=2, cond_dim=8)
    denoiser = Denoiser(DenoiserConfig(backbone=backbone, embed_dim=DIM)).eval()
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.4)
    return denoiser.requires_grad_(False)


def draft(network: Denoiser, rows: int) -> State:
    """Masked, soft, editable and frozen tokens in every row."""
    gamma_L = torch.tensor([0.0, 0.0, 0.5, 4.0, torch.inf, 0.0])
    known_L = torch.tensor([False, False, False, False, False, True])
    tokens_BL = torch.arange(rows * LENGTH).view(rows, LENGTH) % TOKENS
    return State.from_tokens(
        network.table_VD, tokens_BL, known_L.expand(rows, LENGTH), gamma_L.expand(rows, LENGTH)
    )


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_every_path_walks_a_network(network: Denoiser, path: AnyPath) -> None:
    if isinstance(path, Order) and isinstance(path.order, tuple):
        path = Order(tuple(range(LENGTH)))
    state = draft(network, 5)
    for denoiser in (network, Truncated(network, 0.8, 0.9, "drop")):
        made = sample(denoiser, path, state, budget=9, seed=1)
        assert made.calls <= 9
        assert ((made.tokens_BL >= 0) & (made.tokens_BL < TOKENS)).all()
        assert torch.equal(made.tokens_BL[:, -1], state.tokens_BL[:, -1])


def test_jvp_of_a_network_is_its_derivative_along_the_drift(network: Denoiser) -> None:
    """Also where a token is masked: there the network reads a constant, not z."""
    denoiser = Denoiser(network.config).double().eval().requires_grad_(False)
    denoiser.load_state_dict(network.state_dict())
    state = draft(denoiser, 2)
    x_hat_BLD = denoiser(state).mean()
    moves_BL = ~state.revealed_BL
    # Faint evidence of the same z, which the network does read.
    faint = replace(state, gamma_BL=state.gamma_BL.clamp_min(1e-9))

    def ahead(h: float) -> Tensor:
        z_BLD = state.z_BLD + h * x_hat_BLD * moves_BL[..., None]
        return denoiser(replace(faint, z_BLD=z_BLD)).mean()

    h = 1e-3
    by_difference_BL = ((ahead(h) - ahead(-h)) / (2 * h)).norm(dim=-1) * moves_BL
    clock = Clock(call=0, budget=9, draws=Draws(0, 0, 0), evaluate=denoiser)
    kappa_BL = jvp(state, x_hat_BLD, clock)
    torch.testing.assert_close(kappa_BL, by_difference_BL, rtol=1e-3, atol=1e-7)
    assert (kappa_BL[:, :4] > 1e-5).all()
