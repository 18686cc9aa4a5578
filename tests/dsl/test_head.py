"""The chunked cross-entropy of the head against the plain one."""

import pytest
import torch
import torch.nn.functional as F

import dsl.chunks
from dsl.head import nats

N, W, V, D = 7, 5, 11, 3


def given(dtype=torch.float64, positions=N, tokens=V, width=W, dim=D):
    """What `nats` takes: a head of this dtype, evidence in float32 or better."""
    draw = torch.Generator().manual_seed(0)
    shapes = (positions, width), (tokens, width), (tokens,), (positions, dim), (tokens, dim)
    leaves = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    tokens_N = torch.randint(tokens, (positions,), generator=draw)
    wide = torch.promote_types(dtype, torch.float32)
    dtypes = (dtype, dtype, dtype, wide, wide)
    return *(x.to(to).requires_grad_() for x, to in zip(leaves, dtypes, strict=True)), tokens_N


def plain(hidden_NW, weight_VW, bias_V, z_ND, table_VD, tokens_N):
    logits_NV = F.linear(hidden_NW, weight_VW, bias_V) + z_ND @ table_VD.T
    return F.cross_entropy(logits_NV, tokens_N, reduction="none")


def gradients(function, given, weight_N):
    *leaves, _ = given
    if function is nats:
        return torch.autograd.grad(nats(*given, weight_N.to(leaves[3].dtype))[0], leaves)
    return torch.autograd.grad((function(*given) * weight_N).sum(), leaves)


def read(given):
    """The nats alone."""
    return nats(*given, torch.ones(len(given[0]), dtype=given[3].dtype))[1]


@pytest.mark.parametrize("positions", [0, 1, 6, N])
@pytest.mark.parametrize("chunk", [1, 3, 100], ids="chunks of {}".format)
@pytest.mark.parametrize("dim", [0, D], ids="D = {}".format)
def test_values_and_gradients_are_those_of_the_plain_formula(monkeypatch, positions, chunk, dim):
    monkeypatch.setattr(dsl.chunks, "CHUNK_ELEMENTS", chunk * V / 2)
    case = given(positions=positions, dim=dim)
    weight_N = torch.arange(positions, dtype=torch.float64) - 1.5
    torch.testing.assert_close(read(case), plain(*case))
    torch.testing.assert_close(nats(*case, weight_N)[0], (weight_N * plain(*case)).sum())
    torch.testing.assert_close(gradients(nats, case, weight_N), gradients(plain, case, weight_N))


def test_gradients_are_derivatives():
    *leaves, tokens_N = given()
    share_N = torch.arange(N, dtype=torch.float64) - 1.5
    assert torch.autograd.gradcheck(lambda *leaves: nats(*leaves, tokens_N, share_N)[0], leaves)


def test_logits_of_any_size_give_finite_gradients():
    hidden_NW, *rest = given(torch.float32)
    case = ((hidden_NW * 1e4).detach().requires_grad_(), *rest)
    assert all(g.isfinite().all() for g in gradients(nats, case, torch.ones(N)))


def test_a_token_that_is_never_predicted_leaves_the_gradients_finite():
    hidden_NW, weight_VW, bias_V, z_ND, table_VD, tokens_N = given()
    bias_V = bias_V.detach().index_fill(0, torch.tensor([V - 1]), -torch.inf).requires_grad_()
    case = (hidden_NW, weight_VW, bias_V, z_ND, table_VD, tokens_N % (V - 1))
    torch.testing.assert_close(read(case), plain(*case))
    found = gradients(nats, case, torch.ones(N))
    torch.testing.assert_close(found, gradients(plain, case, torch.ones(N)))
    assert all(grad.isfinite().all() for grad in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_that_cannot_be_has_infinite_nats(dtype):
    """A run stops at a loss that is not finite, and would go on at any other."""
    hidden_NW, weight_VW, bias_V, z_ND, table_VD, _ = given(dtype)
    bias_V = bias_V.detach().index_fill(0, torch.tensor([V - 1]), -torch.inf)
    tokens_N = torch.arange(N) % 2 + V - 2
    nats_N = read((hidden_NW, weight_VW, bias_V, z_ND, table_VD, tokens_N))
    assert nats_N.isinf().tolist() == (tokens_N == V - 1).tolist()


def test_the_gradient_of_the_head_is_not_rounded_after_every_chunk(monkeypatch):
    """In bfloat16 it is as good as that of one chunk; summed in bfloat16 it would be worse."""
    exact = gradients(plain, given(positions=512, width=16), torch.ones(512))

    def error(chunk):
        monkeypatch.setattr(dsl.chunks, "CHUNK_ELEMENTS", chunk * V / 2)
        case = given(torch.bfloat16, positions=512, width=16)
        found = gradients(nats, case, torch.ones(512))[1]
        return ((found.double() - exact[1]).norm() / exact[1].norm()).item()

    assert error(1) < 1.5 * error(512)


def test_the_gradient_of_a_mean_is_not_scaled_by_a_rounded_share():
    """bfloat16's 1/600 is 0.2 % off, and so would be the gradients of all weights."""
    exact = gradients(plain, given(positions=600, width=16), torch.full((600,), 1 / 600))
    case = given(torch.bfloat16, positions=600, width=16)
    found = gradients(nats, case, torch.full((600,), 1 / 600))
    for grad, true in zip(found[:2], exact[:2], strict=True):
        scale = (grad.double() * true).sum() / true.square().sum()
        assert scale.item() == pytest.approx(1, abs=1e-3)


def test_autocast_may_bring_another_dtype_than_the_head():
    hidden_NW, weight_VW, *rest = (x.detach() for x in given(torch.float32))
    weight_VW.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value, value_N = nats(hidden_NW.bfloat16(), weight_VW, *rest, torch.ones(N))
    value.backward()
    assert value_N.dtype == weight_VW.grad.dtype == torch.float32
    expected_N = plain(hidden_NW, weight_VW, *rest)
    torch.testing.assert_close(value_N, expected_N, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_frozen_weight_changes_no_other_gradient(dtype):
    """Of a large frozen head no gradient is made, which would be as large."""
    *leaves, tokens_N = given(dtype)
    share_N = torch.arange(N, dtype=leaves[3].dtype)
    asked = [leaf for i, leaf in enumerate(leaves) if i != 1]
    expected = torch.autograd.grad(nats(*leaves, tokens_N, share_N)[0], asked)
    leaves[1] = leaves[1].detach()
    found = torch.autograd.grad(nats(*leaves, tokens_N, share_N)[0], asked)
    torch.testing.assert_close(found, expected)
