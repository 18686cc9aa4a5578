"""The exact posterior of a hidden Markov model: enumeration, and the chain that it becomes where
every state emits one token.

Shapes: B rows, L positions, V tokens, S states or sequences.
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
from dsl import ChainDenoiser, HiddenChainDenoiser
from dsl.paths import Hybrid, Masked, SentenceSDE
from dsl.state import State
from tests.dsl.laws import ring
from tests.dsl.test_chain import states


def random(shape: tuple[int, ...], generator: torch.Generator, zeros: float) -> Tensor:
    """Probabilities along the last dimension, of which a share is 0."""
    weights = torch.rand(shape, generator=generator, dtype=torch.float64).pow(2)
    kept = torch.rand(shape, generator=generator) >= zeros
    kept[..., 0] |= ~kept.any(-1)
    return weights * kept / (weights * kept).sum(-1, keepdim=True)


def hidden(seed: int, zeros: float = 0.0, states: int = 4) -> HiddenChainDenoiser:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((states,), (states, states), (states, 3))
    return HiddenChainDenoiser(ring(3), *(random(shape, generator, zeros) for shape in shapes))


def every(length: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(3), repeat=length)))


def by_hand(law: HiddenChainDenoiser, tokens_L: Tensor) -> float:
    """The probability of a text, summed over all sequences of states."""
    initial_S, emission_SV = law.chain.initial.exp(), law.emission_SV.exp()
    transition_SS, total = law.chain.transition_VRV[:, 0].exp(), 0.0
    for walk in itertools.product(range(len(initial_S)), repeat=len(tokens_L)):
        chance = initial_S[walk[0]]
        for before, after in itertools.pairwise(walk):
            chance = chance * transition_SS[before, after]
        total += float(chance * emission_SV[list(walk), tokens_L].prod())
    return total


@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_probabilities_of_texts_are_sums_over_the_states(zeros: float) -> None:
    law = hidden(1, zeros)
    for length in (1, 2, 3):
        found_S = law.log_prob(every(length)).exp()
        assert found_S.sum().item() == pytest.approx(1, abs=1e-12)
        for tokens_L, found in zip(every(length), found_S.tolist(), strict=True):
            assert found == pytest.approx(by_hand(law, tokens_L), abs=1e-12)


@settings(max_examples=60)
@given(length=st.integers(1, 5), seed=st.integers(0, 99), zeros=st.sampled_from([0.0, 0.4]))
def test_it_is_the_enumerated_law(length: int, seed: int, zeros: float) -> None:
    """Also where the revealed tokens contradict it: there to what float64 leaves of 1e6 nats."""
    law = hidden(seed, zeros)
    state = states(law.table_VD, 4, length, seed)
    exact = dsl.ExactDenoiser(law.table_VD, every(length), law.log_prob(every(length)).exp())
    found, expected = law(state).log_probs().exp(), exact(state).log_probs().exp()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 if zeros else 1e-10)


def test_a_chain_is_the_model_whose_states_emit_one_token_each() -> None:
    generator = torch.Generator().manual_seed(3)
    initial_V, transition_VV = random((3,), generator, 0.0), random((3, 3), generator, 0.3)
    chain = ChainDenoiser(ring(3), initial_V, transition_VV)
    law = HiddenChainDenoiser(ring(3), initial_V, transition_VV, torch.eye(3))
    state = states(chain.table_VD, 40, 12, seed=0)
    torch.testing.assert_close(
        law(state).log_probs().exp(), chain(state).log_probs().exp(), rtol=0, atol=1e-9
    )
    tokens_BL = chain.draw(50, 12, seed=1)
    torch.testing.assert_close(law.log_prob(tokens_BL), chain.log_prob(tokens_BL))


def test_its_own_draws_have_its_frequencies() -> None:
    law = hidden(5, zeros=0.2)
    drawn_BL = law.draw(20_000, 4, seed=0)
    found_S = torch.bincount(drawn_BL @ torch.tensor([27, 9, 3, 1]), minlength=81) / 20_000
    expected_S = law.log_prob(every(4)).exp()
    error_S = (expected_S * (1 - expected_S) / 20_000).sqrt()
    assert ((found_S - expected_S).abs() <= 5 * error_S + 1e-12).all()


def test_the_likelihood_is_the_same_along_every_path_through_snr() -> None:
    """At L = 128: the path integral to an SNR that leaves nothing open is -log P (003 eq. 3)."""
    law = hidden(2)
    tokens_BL = law.draw(2, 128, seed=5)
    exact_B = -law.log_prob(tokens_BL) / 128
    for contour in ("diffusion", "staggered"):
        found = dsl.likelihood.path_integral(
            law, tokens_BL, gamma_max=60.0, steps=48, seed=0, path=contour
        )
        assert ((found.mean_B - exact_B).abs() <= 5 * found.stderr_B + 0.02).all()


@pytest.mark.parametrize(
    "path", [Masked(), Hybrid(SentenceSDE(gamma_max=8.0), Masked(), split=(3, 3))], ids=repr
)
def test_paths_walk_it(path: dsl.paths.AnyPath) -> None:
    made = dsl.sample(hidden(7, zeros=0.3), path, State.masked(3, 6, 2), budget=6, seed=0)
    assert made.tokens_BL.shape == (3, 6)
    assert all(map(math.isfinite, hidden(7, zeros=0.3).log_prob(made.tokens_BL).tolist()))


FIRST_S, NEXT_SS, EMISSION_SV = torch.ones(4) / 4, torch.ones(4, 4) / 4, torch.ones(4, 3) / 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((FIRST_S, NEXT_SS, torch.ones(4, 2) / 2), r"emission must be \[4, 3\]"),
        ((FIRST_S, torch.ones(2, 2) / 2, EMISSION_SV), r"4 states .* transition must be \[4, 4\]"),
        ((NEXT_SS / 4, torch.ones(4, 4, 4) / 4, EMISSION_SV), r"initial must be \[4\]"),
        ((FIRST_S, NEXT_SS, torch.ones(4, 3)), "emission must hold"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[Tensor, Tensor, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HiddenChainDenoiser(ring(3), *arguments)
