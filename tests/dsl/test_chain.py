"""The exact posterior of a Markov chain: enumeration where it is possible, theory where it is not.

Shapes: B rows, L positions, V tokens, S sequences.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dsl
from dsl.chain import ChainDenoiser
from dsl.paths import Hybrid, Masked, SentenceSDE
from dsl.state import State
from tests.dsl.laws import ring
from tests.dsl.walks import PATHS

SNRS = [0.0, 1e-6, 0.5, 3.0, 40.0, 1e4, math.inf]


def chain(tokens: int, order: int, seed: int, zeros: float = 0.0) -> ChainDenoiser:
    """Random probabilities, of which a share is 0."""
    generator = torch.Generator().manual_seed(seed)

    def random(dims: int) -> Tensor:
        weights = torch.rand((tokens,) * dims, generator=generator, dtype=torch.float64).pow(2)
        kept = torch.rand(weights.shape, generator=generator) >= zeros
        kept[..., 0] |= ~kept.any(-1)
        return weights * kept

    initial, transition = random(order), random(order + 1)
    return ChainDenoiser(
        ring(tokens), initial / initial.sum(), transition / transition.sum(-1, keepdim=True)
    )


def enumerated(law: ChainDenoiser, length: int) -> dsl.ExactDenoiser:
    tokens = len(law.table_VD)
    sequences_SL = torch.tensor(list(itertools.product(range(tokens), repeat=length)))
    return dsl.ExactDenoiser(law.table_VD, sequences_SL, law.log_prob(sequences_SL).exp())


def states(table_VD: Tensor, rows: int, length: int, seed: int) -> State:
    """Random tokens through the channel at random SNR, every kind of knowledge among them."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BL = torch.randint(len(table_VD), (rows, length), generator=generator)
    index_BL = torch.randint(len(SNRS), (rows, length), generator=generator)
    gamma_BL = torch.tensor(SNRS, dtype=torch.float64)[index_BL]
    state = State.from_tokens(table_VD, tokens_BL, torch.zeros(rows, length), gamma_BL)
    noise_BLD = torch.randn(state.z_BLD.shape, generator=generator, dtype=torch.float64)
    spread_BL = gamma_BL.masked_fill(gamma_BL.isinf(), 0).sqrt()
    return State(
        state.tokens_BL, state.z_BLD + spread_BL[..., None] * noise_BLD, gamma_BL, state.frozen_BL
    )


@settings(max_examples=60)
@given(
    order=st.integers(1, 3),
    length=st.integers(1, 6),
    seed=st.integers(0, 99),
    zeros=st.sampled_from([0.0, 0.4]),
)
def test_it_is_the_enumerated_law(order: int, length: int, seed: int, zeros: float) -> None:
    """Also where transitions are impossible and where the revealed tokens contradict the chain:
    there evidence of SNR 1e6 decides, of which float64 keeps fewer digits."""
    law = chain(3, order, seed, zeros)
    state = states(law.table_VD, 4, length, seed)
    found, expected = law(state).log_probs().exp(), enumerated(law, length)(state).log_probs().exp()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 if zeros else 1e-10)


def test_products_of_matrices_are_the_sums_of_exponentials() -> None:
    """With transitions as improbable as float64 can say, and evidence of every size."""
    small = [[1.0, 1e-200, 1e-12], [1e-300, 0.5, 0.5], [0.3, 0.7, 1e-200]]
    transition_VV = torch.tensor(small, dtype=torch.float64)
    law = ChainDenoiser(ring(3), torch.full((3,), 1 / 3), transition_VV)
    state = states(law.table_VD, 50, 12, 0)
    products = law(state).log_probs()
    assert law.all_possible
    law.all_possible = False
    torch.testing.assert_close(products, law(state).log_probs(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_of_texts_sum_to_one(order: int) -> None:
    law = chain(3, order, 7, zeros=0.3)
    for length in (1, 2, 3, 5):
        sequences_SL = torch.tensor(list(itertools.product(range(3), repeat=length)))
        assert law.log_prob(sequences_SL).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_its_own_draws_have_its_frequencies(order: int) -> None:
    law = chain(3, order, 3, zeros=0.2)
    drawn_BL = law.draw(20_000, 4, seed=0)
    index_B = (drawn_BL * 3 ** torch.arange(3, -1, -1)).sum(1)
    found_S = torch.bincount(index_B, minlength=81) / 20_000
    every_SL = torch.tensor(list(itertools.product(range(3), repeat=4)))
    expected_S = law.log_prob(every_SL).exp()
    error_S = (expected_S * (1 - expected_S) / 20_000).sqrt()
    assert ((found_S - expected_S).abs() <= 5 * error_S + 1e-12).all()


def test_rows_do_not_depend_on_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    law = chain(5, 2, 1)
    state = states(law.table_VD, 9, 12, 2)
    whole = law(state).log_probs()
    monkeypatch.setattr("dsl.chain.MOST_ELEMENTS", 1)
    torch.testing.assert_close(law(state).log_probs(), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_every_path_walks_it(path: dsl.paths.AnyPath) -> None:
    law = chain(3, 1, 5, zeros=0.3)
    made = dsl.sample(law, path, State.masked(3, 4, 2), budget=6, seed=0)
    assert made.tokens_BL.shape == (3, 4)
    assert made.calls <= 6


def test_fitting_finds_the_chain_that_wrote_the_text() -> None:
    law = chain(4, 2, 11)
    fitted = ChainDenoiser.fit(law.table_VD, law.draw(4_000, 64, seed=1), order=2)
    for found, true in (
        (fitted.transition_VRV.exp(), law.transition_VRV.exp()),
        (fitted.log_prob(law.draw(500, 64, 2)).mean(), law.log_prob(law.draw(500, 64, 2)).mean()),
    ):
        torch.testing.assert_close(found, true, rtol=0.02, atol=0.02)


def test_a_history_never_seen_is_followed_by_any_token_alike() -> None:
    law = ChainDenoiser.fit(ring(3), torch.tensor([[0, 1, 0, 1]]), smoothing=0)
    assert law.transition_VRV[2, 0].exp().tolist() == pytest.approx([1 / 3] * 3)
    assert law.log_prob(torch.tensor([[0, 1, 0]])).item() == pytest.approx(math.log(2 / 3))


def test_the_likelihood_is_the_same_along_every_path_through_snr() -> None:
    """At L = 256: the path integral to an SNR that leaves nothing open is -log P (003 eq. 3)."""
    law = chain(4, 1, 2)
    tokens_BL = law.draw(2, 256, seed=5)
    exact_B = -law.log_prob(tokens_BL) / 256
    for contour in ("diffusion", "left_to_right", "staggered"):
        found = dsl.likelihood.path_integral(
            law, tokens_BL, gamma_max=60.0, steps=48, seed=0, path=contour
        )
        gap_B = (found.mean_B - exact_B).abs()
        assert (gap_B <= 5 * found.stderr_B + 0.02).all(), (contour, gap_B)


def test_the_hybrid_bound_lies_above_it() -> None:
    law = chain(4, 1, 4)
    tokens_BL = law.draw(64, 32, seed=3)
    bound = dsl.likelihood.hybrid_bound(law, tokens_BL, gamma_star=3.0, steps=16, seed=0)
    gap_B = bound.mean_B + law.log_prob(tokens_BL) / 32
    assert gap_B.mean() > -3 * gap_B.std() / 8
    tight = dsl.likelihood.hybrid_bound(law, tokens_BL, gamma_star=60.0, steps=32, seed=0)
    assert abs(tight.mean_B.mean() + law.log_prob(tokens_BL).mean() / 32) < gap_B.mean()


def test_few_calls_cost_less_along_snr_than_masked() -> None:
    """Texts at L / 4 calls against the law, in nats per token of the chain's own entropy."""
    law = chain(4, 1, 9)
    entropy = -law.log_prob(law.draw(400, 32, seed=0)).mean() / 32
    path = Hybrid(SentenceSDE(gamma_max=8.0, grid="log"), Masked(), split=(4, 4))
    gaps = []
    for walk in (Masked(), path):
        made = dsl.sample(law, walk, State.masked(400, 32, 2), budget=8, seed=1)
        gaps.append(float(-law.log_prob(made.tokens_BL).mean() / 32 - entropy))
    assert gaps[1] < gaps[0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ChainDenoiser(ring(3), torch.ones(3), torch.ones(3, 3) / 3), "initial must hold"),
        (lambda: ChainDenoiser(ring(3), torch.ones(3) / 3, torch.eye(4)), r"transition \[3\]"),
        (lambda: ChainDenoiser(ring(3), torch.ones(3) / 3, -torch.eye(3)), "transition must hold"),
        (lambda: ChainDenoiser.fit(ring(3), torch.zeros(2, 5), order=4), "order must be"),
        (lambda: ChainDenoiser.fit(ring(3), torch.zeros(2, 2), order=2), "more than 2 tokens"),
        (lambda: ChainDenoiser.fit(ring(3), torch.zeros(2, 5)), "texts must be ids"),
        (lambda: ChainDenoiser.fit(ring(3), torch.full((1, 4), 3)), "outside"),
        (lambda: ChainDenoiser.fit(ring(3), torch.zeros(1, 4), smoothing=-1.0), "smoothing"),
        (lambda: chain(3, 1, seed=0).log_prob(torch.tensor([[0, -1]])), "outside"),
    ],
)
def test_bad_arguments_are_named(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]
