"""Scores from bfloat16 factors beside those of float64, and what is compiled beside what is not.

Shapes: N positions, V tokens, D dimensions of the table, W backbone width.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dsl.chunks
from dsl import narrow
from dsl.converter import NarrowMixture, biased, mixture, weights
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiTConfig
from dsl.head import nats
from dsl.passes import PLAIN, Passes
from dsl.paths import Masked, SentenceSDE, TokenSDE
from dsl.sampling import sample
from dsl.state import State

N, V, D, W = 40, 61, 16, 24


def asked(strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """Evidence whose products with unit rows reach `strength` nats, the rows, and biases."""
    draw = torch.Generator().manual_seed(0)
    table_VD = F.normalize(torch.randn(V, D, generator=draw), dim=1)
    tokens_N = torch.randint(V, (N,), generator=draw)
    noise_ND = strength**0.5 * torch.randn(N, D, generator=draw)
    bias_V = -11 * torch.rand(V, generator=draw)
    return strength * table_VD[tokens_N] + noise_ND, table_VD, bias_V


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0, 1000.0])
def test_scores_keep_sixteen_bits_of_evidence(strength: float) -> None:
    query_NK, key_VK = biased(*asked(strength))
    exact_NV = query_NK.double() @ key_VK.double().T
    scores_NV = narrow.product(narrow.queries(query_NK), narrow.keys(key_VK).T)[:, :V]
    off_NV = (scores_NV - exact_NV).abs()
    lengths_N1 = query_NK[:, :-1].double().norm(dim=1, keepdim=True)  # those of the rows are 1
    assert (off_NV <= lengths_N1 * 2**-15 + 1e-5).all()
    # bfloat16 by itself is far worse, or the test would show nothing.
    plain_NV = query_NK.bfloat16().double() @ key_VK.bfloat16().double().T
    assert (plain_NV - exact_NV).abs().max() > 20 * off_NV.max()


def test_a_bias_is_as_exact_as_float32() -> None:
    _, table_VD, bias_V = asked(1.0)
    query_NK, key_VK = biased(torch.zeros(N, D), table_VD, bias_V)
    scores_NV = narrow.product(narrow.queries(query_NK), narrow.keys(key_VK).T)[:, :V]
    torch.testing.assert_close(scores_NV, bias_V.expand(N, V), atol=1e-5, rtol=0)


def test_a_compiler_leaves_parts_alone() -> None:
    """It would take the low ones for zero: evidence in the hundreds was wrong by a nat."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    query_NK, key_VK = biased(*asked(100.0))
    for function, wide in ((narrow.queries, query_NK), (narrow.keys, key_VK)):
        made = torch.compile(function, backend=backend)(wide)
        assert torch.equal(made, function(wide))
    torch.compiler.reset()
    assert not any("bfloat16" in graph.code for graph in graphs)


def test_padded_tokens_and_those_that_cannot_be_have_no_probability() -> None:
    z_ND, table_VD, bias_V = asked(100.0)
    bias_V[7] = -torch.inf
    query_NK, key_VK = biased(z_ND, table_VD, bias_V)
    key_PA = narrow.keys(key_VK)
    assert len(key_PA) == 64
    probs_NP = narrow.product(narrow.queries(query_NK), key_PA.T).softmax(1)
    assert not probs_NP[:, V:].any()
    assert not probs_NP[:, 7].any()
    torch.testing.assert_close(probs_NP.sum(1), torch.ones(N))


@pytest.mark.parametrize("strength", [1.0, 300.0])
def test_nats_and_gradients_are_those_of_the_same_factors_in_float64(strength: float) -> None:
    draw = torch.Generator().manual_seed(1)
    hidden_NW = torch.randn(N, W, generator=draw).bfloat16()
    weight_VW = torch.randn(V, W, generator=draw).bfloat16()
    z_ND, table_VD, bias_V = asked(strength)
    tokens_N, weight_N = torch.randint(V, (N,), generator=draw), torch.rand(N, generator=draw)
    given = hidden_NW, weight_VW, bias_V, z_ND, table_VD
    ours = [leaf.clone().requires_grad_() for leaf in given]
    exact = [leaf.double().requires_grad_() for leaf in given]
    value, nats_N = nats(*ours, tokens_N, weight_N)
    true_value, exact_N = nats(*exact, tokens_N, weight_N.double())
    torch.testing.assert_close(nats_N.double(), exact_N, atol=1e-5 * (strength + 10), rtol=0)
    found, true = torch.autograd.grad(value, ours), torch.autograd.grad(true_value, exact)
    for grad, of in zip(found, true, strict=True):
        assert (grad.double() - of).norm() < 0.01 * of.norm()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [7, 100], ids="chunks of {}".format)
@pytest.mark.parametrize(("strength", "bias"), [(3.0, 0.0), (30.0, 0.0), (3.0, 15.0)])
def test_a_mixture_and_its_gradients_are_those_of_the_same_factors_in_float64(
    chunk: int, strength: float, bias: float, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where evidence or a bias is strong, one weight is nearly 1 and gradients nearly cancel."""
    monkeypatch.setattr(dsl.chunks, "CHUNK_ELEMENTS", chunk * V)
    draw = torch.Generator().manual_seed(3)
    z_ND, table_VD, bias_V = asked(strength)
    bias_V[-1] += bias
    values_VW, toward_NW = (torch.randn(n, W, generator=draw).bfloat16() for n in (V, N))
    leaves = z_ND, table_VD, bias_V, values_VW
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    ours[3].requires_grad_(not frozen)
    mixed_NW = NarrowMixture.apply(*biased(*ours[:3]), ours[3])
    exact_NW = weights(*biased(*exact[:3])) @ exact[3]
    assert (mixed_NW.double() - exact_NW).norm() < 0.01 * exact_NW.norm()
    wanted = 3 if frozen else 4
    found = torch.autograd.grad(mixed_NW, ours[:wanted], toward_NW)
    true = torch.autograd.grad(exact_NW, exact[:wanted], toward_NW.double())
    for grad, of in zip(found, true, strict=True):
        assert (grad.double() - of).norm() < 0.01 * of.norm()


def test_a_mixture_is_divided_by_the_sum_of_its_weights_as_they_are() -> None:
    """Compiled, a sum within the pass would be that of weights that are not rounded yet."""
    draw = torch.Generator().manual_seed(3)
    query_NK, key_VK = biased(*asked(3.0))
    values_VW = torch.randn(V, W, generator=draw).bfloat16()
    twice = Passes(softmax=lambda *given: 2 * PLAIN.softmax(*given))
    found_NW, expected_NW = (mixture(query_NK, key_VK, values_VW, p) for p in (twice, PLAIN))
    assert torch.equal(found_NW, expected_NW)


@pytest.fixture
def traced() -> object:
    """Functions are traced and not compiled, which would take a C++ compiler and a minute."""
    with torch.compiler.set_stance(force_backend="aot_eager"):
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("traced")
def test_compiled_passes_answer_alike() -> None:
    draw = torch.Generator().manual_seed(2)
    scores_NP, grad_NP = (3 * torch.randn(N, 128, generator=draw) for _ in range(2))
    tokens_N, grad_N = torch.arange(N), torch.rand(N, generator=draw)

    def answers(passes: Passes) -> list[Tensor]:
        log_sum_N = passes.log_sums(scores_NP)
        return [
            log_sum_N,
            passes.softmax(scores_NP, log_sum_N),
            passes.errors(scores_NP, log_sum_N, tokens_N, grad_N),
            *passes.softmax_gradients(scores_NP, log_sum_N, grad_NP, grad_N),
        ]

    plain, compiled = answers(PLAIN), answers(PLAIN.compiled())
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(plain[0], scores_NP.logsumexp(1))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "path",
    [Masked(), SentenceSDE(gamma_max=20.0), TokenSDE(gamma_max=20.0, delta=0.1, curvature="jvp")],
    ids=["masked", "sde", "jvp"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_network_draws_the_same_texts(path: object, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = DiTConfig(tokens=V, width=W, blocks=2, heads=2, cond_dim=8, start="open")
    plain = Denoiser(DenoiserConfig(backbone=shape, embed_dim=D)).eval().computing_in(dtype)
    state = State.masked(2, 6, D)
    expected = sample(plain, path, state, budget=5, seed=1)
    made = sample(plain.compiled(), path, state, budget=5, seed=1)
    assert torch.equal(made.tokens_BL, expected.tokens_BL)
