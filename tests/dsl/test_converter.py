"""The converter: Bayes where it must be, exact at the endpoints, and small in memory.

Shapes: B rows, L positions, D table dimension, V tokens, U = V + 1 slots, N evidence positions.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dsl.chunks
from dsl.converter import Converter, Mixture, NarrowMixture, biased, mask_bias, weights
from dsl.denoiser import TokenTable
from dsl.exact import ExactDenoiser
from dsl.state import State

ROWS, LENGTH, TOKENS, DIM = 2, 12, 5, 3


def random_state(seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> State:
    """Masked, evidence and revealed positions, in turn."""
    torch.manual_seed(seed)
    turn_BL = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 3
    gamma_BL = torch.tensor([0.0, 2.0, torch.inf], dtype=dtype)[turn_BL]
    z_BLD = scale * torch.randn(ROWS, LENGTH, DIM, dtype=dtype)
    return State(
        tokens_BL=torch.randint(TOKENS, (ROWS, LENGTH)) * (turn_BL == 2),
        z_BLD=z_BLD * (turn_BL == 1)[..., None],
        gamma_BL=gamma_BL,
        frozen_BL=torch.zeros(ROWS, LENGTH, dtype=torch.bool),
    )


def slots(dtype: torch.dtype = torch.float32) -> Tensor:
    """Values under which the converter's output is its weights over the slots."""
    return torch.eye(TOKENS + 1, dtype=dtype)


@torch.no_grad()
def test_it_is_the_bayes_posterior_of_a_token_seen_alone():
    torch.manual_seed(0)
    table_VD = TokenTable(TOKENS, DIM).double()()
    prior_V = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    converter = Converter(TOKENS, DIM, beta=1.0, mask_prior=0.5).double()
    converter.bias_U.copy_(torch.cat([prior_V.log(), torch.tensor([-torch.inf])]))
    z_BLD = 4 * torch.randn(50, 1, DIM, dtype=torch.float64)
    state = State(
        tokens_BL=torch.zeros(50, 1, dtype=torch.int64),
        z_BLD=z_BLD,
        gamma_BL=torch.ones(50, 1, dtype=torch.float64),
        frozen_BL=torch.zeros(50, 1, dtype=torch.bool),
    )
    exact = ExactDenoiser(table_VD, torch.arange(TOKENS)[:, None], prior_V)
    weights_BLU = converter(state, table_VD, slots(torch.float64))
    expected_BLV = exact(state).log_probs().exp()
    torch.testing.assert_close(weights_BLU[..., :-1], expected_BLV, atol=1e-12, rtol=1e-12)
    assert not weights_BLU[..., -1].any()


@torch.no_grad()
def test_every_kind_of_token_against_the_formula():
    state, table_VD = random_state(), TokenTable(TOKENS, DIM)()
    converter = Converter(TOKENS, DIM, beta=0.7, mask_prior=0.3)
    keys_UD = torch.cat([table_VD, torch.zeros(1, DIM)])
    soft_BLU = (0.7 * state.z_BLD @ keys_UD.T + converter.bias_U).softmax(-1)
    hard_BLU = slots()[state.tokens_BL]
    expected_BLU = torch.where(state.revealed_BL[..., None], hard_BLU, soft_BLU)
    weights_BLU = converter(state, table_VD, slots())
    torch.testing.assert_close(weights_BLU, expected_BLU, atol=1e-6, rtol=1e-6)
    assert torch.equal(weights_BLU[state.revealed_BL], hard_BLU[state.revealed_BL])


@given(seed=st.integers(0, 2**31), scale=st.floats(0, 1e6), prior=st.floats(1e-12, 1))
@torch.no_grad()
def test_weights_are_a_distribution(seed, scale, prior):
    state = random_state(seed, scale)
    converter = Converter(TOKENS, DIM, beta=None, mask_prior=prior)
    weights_BLU = converter(state, TokenTable(TOKENS, DIM)(), slots())
    assert (weights_BLU >= 0).all()
    torch.testing.assert_close(weights_BLU.sum(-1), torch.ones(ROWS, LENGTH))


def test_beta_starts_at_the_scale_of_the_dimension():
    assert Converter(TOKENS, 16, beta=None, mask_prior=0.5).beta.tolist() == [0.25]
    assert Converter(TOKENS, 16, beta=0.5, mask_prior=0.5).beta.tolist() == [0.5]


def test_the_mask_bias_is_the_prior_s_logit():
    assert mask_bias(50257, 0.5) == pytest.approx(math.log(50257), abs=1e-12)
    assert mask_bias(50257, 0.99) == pytest.approx(15.42, abs=5e-3)
    assert mask_bias(1, 1 - 1e-9) == pytest.approx(9 * math.log(10), abs=1e-6)
    for wrong in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="mask_prior"):
            mask_bias(10, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_hard_mask_is_the_mask_row_exactly_and_strong_evidence_is_still_heard(dtype):
    torch.manual_seed(0)
    table_VD, values_UW = TokenTable(TOKENS, DIM)(), torch.randn(TOKENS + 1, 8).to(dtype)
    converter = Converter(TOKENS, DIM, beta=1.0, mask_prior=1.0)
    masked_BLW = converter(State.masked(2, 3, DIM), table_VD, values_UW)
    assert torch.equal(masked_BLW, values_UW[-1].expand(2, 3, 8))
    token_BL = torch.tensor([[2, 2]])
    trust_BL = torch.tensor([[1.0, 1000.0]])
    state = State.from_tokens(table_VD, token_BL, torch.zeros(1, 2, dtype=torch.bool), trust_BL)
    weak_W, strong_W = converter(state, table_VD, values_UW)[0]
    torch.testing.assert_close(weak_W, values_UW[-1])
    torch.testing.assert_close(strong_W, values_UW[2])


@torch.no_grad()
def test_scores_keep_float32_under_low_precision_compute():
    # Two tokens whose scores are in the hundreds and a few nats apart.
    torch.manual_seed(0)
    table_VD = TokenTable(2, DIM)()
    apart_D, between_D = table_VD[0] - table_VD[1], table_VD[0] + table_VD[1]
    z_BLD = 300 * between_D / between_D.norm() + torch.linspace(-2, 2, 9)[None, :, None] * apart_D
    state = replace(State.masked(1, 9, DIM), z_BLD=z_BLD, gamma_BL=torch.ones(1, 9))
    converter, values_UW = Converter(2, DIM, beta=1.0, mask_prior=0.5), torch.eye(3)
    exact_BLU = converter(state, table_VD, values_UW)
    assert exact_BLU[0, 0, 0] < 0.4 < 0.6 < exact_BLU[0, -1, 0]
    with torch.autocast("cpu", torch.bfloat16):
        autocast_BLU = converter(state, table_VD, values_UW)
    low_BLU = converter(state, table_VD, values_UW.bfloat16())
    for weights_BLU in (autocast_BLU, low_BLU):
        torch.testing.assert_close(weights_BLU.float(), exact_BLU, atol=2**-8, rtol=0)


def gradients(
    converter: Converter, table: TokenTable, state: State, values_UW: Tensor
) -> list[Tensor]:
    inputs = [*converter.parameters(), *table.parameters(), values_UW]
    torch.manual_seed(0)
    outputs_BLW = converter(state, table(), values_UW)
    loss = (outputs_BLW * torch.randn_like(outputs_BLW)).sum()
    return [outputs_BLW, *torch.autograd.grad(loss, inputs)]


def test_the_mixture_s_gradients_are_those_of_the_formula(monkeypatch):
    """By finite differences, and against autograd's own through the plain formula."""
    torch.manual_seed(0)
    arguments = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in [(7, DIM + 1), (TOKENS + 1, DIM + 1), (TOKENS + 1, 4)]
    ]
    monkeypatch.setattr(dsl.chunks, "CHUNK_ELEMENTS", 3 * (TOKENS + 1))
    assert torch.autograd.gradcheck(Mixture.apply, arguments)
    query_NK, key_UK, values_UW = arguments
    plain_NW = weights(query_NK, key_UK) @ values_UW
    mixed_NW = Mixture.apply(*arguments)
    torch.testing.assert_close(mixed_NW, plain_NW, atol=1e-14, rtol=0)
    toward_NW = torch.randn_like(plain_NW)
    for ours, autograd in zip(
        torch.autograd.grad(mixed_NW, arguments, toward_NW),
        torch.autograd.grad(plain_NW, arguments, toward_NW),
        strict=True,
    ):
        torch.testing.assert_close(ours, autograd, atol=1e-13, rtol=0)


def test_in_bfloat16_the_bias_keeps_its_gradient_where_one_slot_has_all_the_weight():
    """The gradients of the weights then nearly cancel, unless they are rounded apart. Beside
    float64, plain autograd over products in bfloat16 is off by a few per cent."""
    torch.manual_seed(0)
    positions, tokens, width = 256, 500, 64
    tables = torch.randn(tokens + 1, DIM), torch.randn(tokens + 1, width)
    query_ND, grad_NW = 0.1 * torch.randn(positions, DIM), torch.randn(positions, width)
    prior_U = torch.zeros(tokens + 1)
    prior_U[-1] = mask_bias(tokens, 0.99)

    def bias_gradient(wide: torch.dtype, narrow: torch.dtype) -> Tensor:
        bias_U = prior_U.to(wide).requires_grad_()
        key_UD, values_UW = tables[0].to(wide), tables[1].to(narrow)
        mix = NarrowMixture.apply if narrow == torch.bfloat16 else Mixture.apply
        mixed_NW = mix(*biased(query_ND.to(wide), key_UD, bias_U), values_UW)
        mixed_NW.backward(grad_NW.to(mixed_NW.dtype))
        return bias_U.grad.double()

    exact_U = bias_gradient(torch.float64, torch.float64)
    error_U = bias_gradient(torch.float32, torch.bfloat16) - exact_U
    assert error_U.norm() < 0.1 * exact_U.norm()
    assert error_U[-1].abs() < 0.1 * exact_U[-1].abs()


@pytest.mark.parametrize("size", [64, 2048])
def test_in_bfloat16_the_gradient_of_the_values_is_summed_in_float32(monkeypatch, size):
    torch.manual_seed(0)
    positions, slots = 2048, 8
    monkeypatch.setattr(dsl.chunks, "CHUNK_ELEMENTS", size)
    asked = torch.randn(positions, DIM), torch.randn(slots, DIM), torch.zeros(slots)
    query_NK, key_UK = biased(*asked)
    values_UW = torch.randn(slots, 4).bfloat16().requires_grad_()
    grad_NW = torch.rand(positions, 4).bfloat16()
    NarrowMixture.apply(query_NK, key_UK, values_UW).backward(grad_NW)
    weights_NU = weights(query_NK, key_UK).bfloat16().double()
    exact_UW = weights_NU.T @ grad_NW.double()
    assert (values_UW.grad.double() - exact_UW).norm() < 4e-3 * exact_UW.norm()


def test_in_float16_the_gradient_of_the_values_is_summed_in_float32(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(dsl.chunks, "CHUNK_ELEMENTS", 8)  # one position at a time
    asked = torch.randn(2048, DIM), torch.randn(8, DIM), torch.zeros(8)
    query_NK, key_UK = biased(*asked)
    values_UW, grad_NW = torch.randn(8, 4).half().requires_grad_(), torch.rand(2048, 4).half()
    Mixture.apply(query_NK, key_UK, values_UW).backward(grad_NW)
    exact_UW = weights(query_NK, key_UK).double().T @ grad_NW.double()
    assert (values_UW.grad.double() - exact_UW).norm() < 5e-4 * exact_UW.norm()


def test_frozen_values_get_no_gradient():
    query_NK, key_UK = torch.randn(2, DIM), torch.randn(TOKENS + 1, DIM)
    toward_NW, frozen_UW = torch.randn(2, TOKENS + 1), slots()
    mixed_NW = Mixture.apply(query_NK.requires_grad_(), key_UK, frozen_UW)
    plain_NW = weights(query_NK, key_UK) @ frozen_UW
    found, expected = (torch.autograd.grad(m, query_NK, toward_NW) for m in (mixed_NW, plain_NW))
    torch.testing.assert_close(found, expected)
    assert frozen_UW.grad is None


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    table = TokenTable(TOKENS, DIM).double()
    converter = Converter(TOKENS, DIM, beta=1.0, mask_prior=0.5).double()
    state = random_state(dtype=torch.float64)
    values_UW = torch.randn(TOKENS + 1, 8, dtype=torch.float64, requires_grad=True)
    whole = gradients(converter, table, state, values_UW)
    monkeypatch.setattr(dsl.chunks, "CHUNK_ELEMENTS", 2 * (TOKENS + 1))
    for one, other in zip(whole, gradients(converter, table, state, values_UW), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_without_evidence_every_parameter_still_has_a_gradient():
    table = TokenTable(TOKENS, DIM)
    converter = Converter(TOKENS, DIM, beta=1.0, mask_prior=0.5)
    values_UW = torch.randn(TOKENS + 1, 8, requires_grad=True)
    _, beta, bias_U, table_VD, values_grad_UW = gradients(
        converter, table, State.masked(1, 4, DIM), values_UW
    )
    assert not beta.any()
    assert not table_VD.any()
    assert bias_U.any()
    assert values_grad_UW.any()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_positions_times_vocabulary_never_exists(monkeypatch):
    rows, length, tokens, dim, width = 2, 32, 500, 3, 4
    table, converter = TokenTable(tokens, dim), Converter(tokens, dim, beta=1.0, mask_prior=0.5)
    values_UW = torch.randn(tokens + 1, width, requires_grad=True)
    ones_BL = torch.ones(rows, length)
    state = State.from_tokens(
        table(), ones_BL.long(), torch.zeros(rows, length, dtype=torch.bool), ones_BL
    )
    monkeypatch.setattr(dsl.chunks, "CHUNK_ELEMENTS", 4 * (tokens + 1))
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        converter(state, table(), values_UW).sum().backward()
    assert largest.elements <= 4 * (tokens + 1)
    # What waits for the backward pass: nothing that grows with positions times vocabulary.
    assert sum(kept.values()) < rows * length * tokens / 2


@pytest.mark.parametrize("mask_prior", [0.3, 0.99, 1.0])
def test_a_reading_without_evidence_is_of_the_mask_prior(mask_prior: float) -> None:
    made = Converter(TOKENS, DIM, beta=2.0, mask_prior=mask_prior)
    read = made.read(torch.zeros(3, DIM), torch.tensor([0, 1, 4]), TokenTable(TOKENS, DIM)())
    rest = 1 - mask_prior
    entropy = -mask_prior * math.log(mask_prior)
    entropy -= rest * math.log(rest / TOKENS) if rest else 0.0
    assert read.entropy_N.tolist() == pytest.approx([entropy] * 3, abs=1e-6)
    assert read.mask_N.tolist() == pytest.approx([mask_prior] * 3)
    assert read.token_N.tolist() == pytest.approx([rest / TOKENS] * 3, abs=1e-7)


def test_a_reading_is_of_the_weights_that_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the mixture of one-hot values, a position a chunk."""
    torch.manual_seed(0)
    table_VD, z_ND = TokenTable(TOKENS, DIM)().detach(), 3 * torch.randn(7, DIM)
    made = Converter(TOKENS, DIM, beta=1.5, mask_prior=0.5)
    tokens_N = torch.randint(TOKENS, (7,))
    with torch.no_grad():
        weights_NU = Mixture.apply(*made.asked(z_ND, table_VD), slots())
    monkeypatch.setattr(dsl.chunks, "CHUNK_ELEMENTS", 1)
    read = made.read(z_ND, tokens_N, table_VD)
    entropy_N = torch.distributions.Categorical(probs=weights_NU).entropy()
    torch.testing.assert_close(read.entropy_N, entropy_N)
    torch.testing.assert_close(read.mask_N, weights_NU[:, -1])
    torch.testing.assert_close(read.token_N, weights_NU[range(7), tokens_N])
