"""A network in bfloat16: what stays in float32, and how little the law of its texts changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsl
from dsl.channel import observe
from dsl.denoiser import Denoiser, DenoiserConfig, NetworkPosterior
from dsl.dit import DiTConfig
from dsl.objective import cross_entropy
from dsl.passes import PLAIN
from dsl.paths import AnyPath, EntropyBounded, Hybrid
from dsl.precision import dtype_of
from dsl.state import State
from tests.dsl import hubs
from tests.dsl.walks import HYBRIDS, LAW, PATHS

ROWS, LENGTH, BUDGET = 256, 4, 8
WALKS: list[tuple[AnyPath, int]] = [(path, BUDGET) for path in PATHS] + [
    (Hybrid(first, second, split=(4, 4)), BUDGET) for first, second in HYBRIDS
]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    """A network with random weights over the tokens of `LAW`, as sure of them as a trained one."""
    torch.manual_seed(0)
    config = DenoiserConfig(
        backbone=DiTConfig(tokens=3, width=32, blocks=2, heads=2, cond_dim=16), embed_dim=2
    )
    made = Denoiser(config)
    with torch.no_grad():
        for parameter in made.backbone.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        made.backbone.head[0].normal_(std=0.5)
    return made.eval()


@pytest.fixture(scope="module")
def drafts() -> State:
    """Half of the tokens masked, the others at some SNR: no two rows alike, so that a tie between
    two positions does not decide for all rows at once."""
    draws = torch.Generator().manual_seed(1)
    tokens_BL = torch.randint(3, (ROWS, LENGTH), generator=draws)
    gamma_BL = 2 * torch.rand(ROWS, LENGTH, generator=draws)
    gamma_BL[torch.rand(ROWS, LENGTH, generator=draws) < 0.5] = 0
    return observe(LAW.table_VD.float(), tokens_BL, gamma_BL, draws)


@pytest.mark.parametrize(("path", "budget"), WALKS, ids=lambda walk: getattr(walk, "kind", None))
def test_the_law_of_texts_hardly_changes(
    denoiser: Denoiser, drafts: State, path: AnyPath, budget: int
) -> None:
    def texts(denoiser: Denoiser) -> torch.Tensor:
        return dsl.sample(denoiser, path, drafts, budget=budget, seed=5).tokens_BL

    # Both draw by the same noise. The total variation between the laws of two variables is at most
    # the chance that they differ, however they are coupled.
    differ_BL = texts(denoiser) != texts(denoiser.computing_in(torch.bfloat16))
    # A path that ranks positions by entropy draws others where two are tied up to rounding.
    most = 0.3 if isinstance(path, EntropyBounded) else 0.1
    assert differ_BL.any(1).double().mean() <= most


def test_only_the_network_is_in_bfloat16(denoiser: Denoiser, drafts: State) -> None:
    full, half = denoiser(drafts), denoiser.computing_in(torch.bfloat16)(drafts)
    assert isinstance(half, NetworkPosterior)
    assert half.hidden_BLW.dtype == torch.bfloat16
    assert half.log_probs().dtype == half.mean().dtype == torch.float32
    apart_BL = (full.log_probs().exp() - half.log_probs().exp()).abs().sum(-1) / 2
    assert 0 < apart_BL.max() < 0.02
    # Sums that bfloat16 would miss by its 8 bits.
    at_N = torch.arange(ROWS * LENGTH)
    probs_NV = half.probs_at(at_N)
    torch.testing.assert_close(probs_NV.sum(-1), torch.ones(len(at_N)), rtol=0, atol=1e-6)
    mean_ND = probs_NV.double() @ denoiser.table_VD.double()
    torch.testing.assert_close(half.mean_at(at_N).double(), mean_ND, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_head_is_in_bfloat16_whatever_the_last_norm_answers_in(tmp_path: Path) -> None:
    hubs.saved(tmp_path, "llama")
    half = dsl.from_transformers(tmp_path, embed_dim=4, adapt="shift").computing_in(torch.bfloat16)
    state = State.masked(2, LENGTH, 4)
    posterior = half(state)
    assert isinstance(posterior, NetworkPosterior)
    given = half.hidden(state), posterior.hidden_BLW, posterior.head[0]
    assert {tensor.dtype for tensor in given} == {torch.bfloat16}
    assert posterior.log_probs().dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("skip", [True, False])
def test_the_heads_bias_stays_in_float32(skip: bool) -> None:
    shape = DiTConfig(tokens=50, width=16, blocks=1, heads=1, cond_dim=4)  # its head starts at 0
    made = Denoiser(DenoiserConfig(backbone=shape, embed_dim=4, skip=skip))
    bias_V = torch.linspace(-11, -2, 50)
    made.backbone.head[1].copy_(bias_V)
    log_probs_V = made.computing_in(torch.bfloat16)(State.masked(1, 1, 4)).log_probs()[0, 0]
    torch.testing.assert_close(log_probs_V, bias_V.log_softmax(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("gamma", [15.0, 100.0])
def test_the_loss_hears_evidence_in_float32(gamma: float) -> None:
    """Tokens come in pairs that are close, as those of a trained table: evidence of hundreds of
    nats then speaks for both, a few nats apart."""
    torch.manual_seed(0)
    tokens, rows, length, dim = 60, 16, 16, 16
    shape = DiTConfig(tokens=tokens, width=32, blocks=1, heads=2, cond_dim=8, start="open")
    made = Denoiser(DenoiserConfig(backbone=shape, embed_dim=dim, beta=1.0))
    direction_VD = made.table.direction_VD
    with torch.no_grad():
        direction_VD[1::2] = direction_VD[::2] + 0.33 * direction_VD[1::2]
    tokens_BL = torch.randint(tokens, (rows, length))
    gamma_BL, draws = torch.full((rows, length), gamma), torch.Generator().manual_seed(1)
    state = observe(made.table_VD.detach(), tokens_BL, gamma_BL, draws)

    def loss(denoiser: Denoiser) -> tuple[torch.Tensor, torch.Tensor]:
        value, nats_N = cross_entropy(denoiser, state, tokens_BL, torch.arange(rows * length))
        return nats_N, torch.autograd.grad(value, direction_VD)[0]

    (full_N, full_VD), (half_N, half_VD) = loss(made), loss(made.computing_in(torch.bfloat16))
    assert half_N.dtype == half_VD.dtype == torch.float32
    assert (half_N - full_N).abs().max() < 0.06
    assert (half_VD - full_VD).norm() < 0.01 * full_VD.norm()


def test_the_weights_are_shared_and_stay(denoiser: Denoiser, drafts: State) -> None:
    before = denoiser(drafts).log_probs()
    half = denoiser.computing_in(torch.bfloat16)
    half(drafts).log_probs()
    assert all(a is b for a, b in zip(denoiser.parameters(), half.parameters(), strict=True))
    assert torch.equal(denoiser(drafts).log_probs(), before)
    again = half.computing_in(torch.float32)
    assert torch.equal(again(drafts).log_probs(), before)


def test_what_is_compiled_stays_so_in_another_precision(denoiser: Denoiser) -> None:
    passes = PLAIN.compiled()
    half = denoiser.computing_in(torch.float32, passes).computing_in(torch.bfloat16)
    assert half.passes is passes


def test_what_a_setting_means() -> None:
    assert dtype_of("auto", "cpu") == dtype_of("float32", "cuda") == torch.float32
    assert dtype_of("auto", "cuda:1") == dtype_of("bfloat16", "cpu") == torch.bfloat16
    with pytest.raises(ValueError, match="precision"):
        dtype_of("float16", "cpu")  # type: ignore[arg-type]
