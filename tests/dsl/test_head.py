"""The chunked cross-entropy of the head against the plain one."""

import pytest
import torch
import torch.nn.functional as F

import dsl.chunks
from dsl.head import nats

N, W, V = 7, 5, 11


def given(dtype=torch.float64, positions=N, tokens=V, width=W):
    draw = torch.Generator().manual_seed(0)
    hidden_NW = torch.randn(positions, width, generator=draw, dtype=torch.float64)
    weight_VW = torch.randn(tokens, width, generator=draw, dtype=torch.float64)
    bias_V = torch.randn(tokens, generator=draw, dtype=torch.float64)
    tokens_N = torch.randint(tokens, (positions,), generator=draw)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden_NW, weight_VW, bias_V)]
    return *leaves, tokens_N


def plain(hidden_NW, weight_VW, bias_V, tokens_N):
    return F.cross_entropy(F.linear(hidden_NW, weight_VW, bias_V), tokens_N, reduction="none")


def gradients(function, given, weight_N):
    *leaves, tokens_N = given
    return torch.autograd.grad((function(*leaves, tokens_N) * weight_N).sum(), leaves)


@pytest.mark.parametrize("positions", [0, 1, 6, N])
@pytest.mark.parametrize("chunk", [1, 3, 100], ids="chunks of {}".format)
def test_values_and_gradients_are_those_of_the_plain_formula(monkeypatch, positions, chunk):
    monkeypatch.setattr(dsl.chunks, "CHUNK_ELEMENTS", chunk * V / 2)
    case = given(positions=positions)
    weight_N = torch.arange(positions, dtype=torch.float64) - 1.5
    torch.testing.assert_close(nats(*case), plain(*case))
    torch.testing.assert_close(gradients(nats, case, weight_N), gradients(plain, case, weight_N))


def test_gradients_are_derivatives():
    *leaves, tokens_N = given()
    assert torch.autograd.gradcheck(lambda *leaves: nats(*leaves, tokens_N), leaves)


def test_logits_of_any_size_give_finite_gradients():
    hidden_NW, weight_VW, bias_V, tokens_N = given(torch.float32)
    case = ((hidden_NW * 1e4).detach().requires_grad_(), weight_VW, bias_V, tokens_N)
    assert all(g.isfinite().all() for g in gradients(nats, case, torch.ones(N)))


def test_the_gradient_of_the_head_is_not_rounded_after_every_chunk(monkeypatch):
    """In bfloat16 it is as good as that of one chunk; summed in bfloat16 it would be worse."""
    exact = gradients(plain, given(positions=512, width=16), torch.ones(512))

    def error(chunk):
        monkeypatch.setattr(dsl.chunks, "CHUNK_ELEMENTS", chunk * V / 2)
        case = given(torch.bfloat16, positions=512, width=16)
        found = gradients(nats, case, torch.ones(512))[1]
        return ((found.double() - exact[1]).norm() / exact[1].norm()).item()

    assert error(1) < 1.5 * error(512)


def test_autocast_may_bring_another_dtype_than_the_head():
    hidden_NW, weight_VW, bias_V, tokens_N = (x.detach() for x in given(torch.float32))
    weight_VW.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value_N = nats(hidden_NW.bfloat16(), weight_VW, bias_V, tokens_N)
    value_N.sum().backward()
    assert value_N.dtype == weight_VW.grad.dtype == torch.float32
    expected_N = plain(hidden_NW, weight_VW, bias_V, tokens_N)
    torch.testing.assert_close(value_N, expected_N, rtol=0.05, atol=0.05)
