"""The likelihood under an unmasking procedure is the law of what the procedure draws.

Shapes: B rows, L positions, S sequences.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import dsl
from dsl import chunks, unmasking
from dsl.paths import AnyPath, EntropyBounded, Hybrid, Masked, Order, Remask, SentenceSDE
from dsl.posterior import Posterior
from dsl.state import State
from dsl.truncation import Truncated
from tests.dsl.laws import Written, random_law

LAW = random_law(tokens=3, length=4, dim=2, seed=3)
EVERY_SL = torch.tensor(list(itertools.product(range(3), repeat=4)))
DETERMINISTIC: list[AnyPath] = [
    Order("left_to_right"),
    Order((3, 1, 2, 0)),
    EntropyBounded(bound=0.0),
    EntropyBounded(bound=0.7),
]


def of_every_text(path: AnyPath, budget: int, denoiser: object = None) -> torch.Tensor:
    chosen = denoiser or LAW.denoiser()
    found = unmasking.estimate(chosen, EVERY_SL, path, budget=budget, seed=0)  # type: ignore[arg-type]
    return (-4 * found.mean_B).exp()


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("path", DETERMINISTIC, ids=repr)
def test_probabilities_of_all_texts_sum_to_one(path: AnyPath, budget: int) -> None:
    assert of_every_text(path, budget).sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("path", DETERMINISTIC[:3], ids=repr)
def test_one_token_a_call_from_the_exact_posterior_is_the_law(path: AnyPath) -> None:
    expected_S = (-4 * LAW.nats(EVERY_SL)).exp()
    torch.testing.assert_close(of_every_text(path, 4), expected_S, rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", DETERMINISTIC, ids=repr)
def test_what_is_drawn_has_that_law(path: AnyPath) -> None:
    """Two calls for four tokens, which are drawn apart: not the law of the denoiser."""
    sharp = Truncated(LAW.denoiser(), 0.7)
    rows = 20_000
    made = dsl.sample(sharp, path, State.masked(rows, 4, 2), budget=2, seed=1)
    found_S = torch.bincount(made.tokens_BL @ torch.tensor([27, 9, 3, 1]), minlength=81) / rows
    expected_S = of_every_text(path, 2, sharp)
    error_S = (expected_S * (1 - expected_S) / rows).sqrt()
    assert ((found_S - expected_S).abs() <= 5 * error_S + 1e-9).all()


def test_a_drawn_order_gives_a_bound() -> None:
    tokens_BL = LAW.draw(400, seed=0)
    found = unmasking.estimate(LAW.denoiser(), tokens_BL, Masked(), budget=2, seed=0)
    gap_B = found.mean_B - LAW.nats(tokens_BL)
    assert gap_B.mean() > 3 * gap_B.std() / 20


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (SentenceSDE(gamma_max=9.0), "finite SNR"),
        (Remask(rule="cap", eta=0.9), "twice"),
        (Hybrid(Masked(), Remask(rule="conf"), split=(7, 1)), "twice"),
        (Hybrid(SentenceSDE(gamma_max=9.0), Masked(), split=(4, 4)), "finite SNR"),
    ],
)
def test_other_paths_are_refused(path: AnyPath, said: str) -> None:
    """Whatever they would do in this run: in one call nothing is revealed twice."""
    for budget in (1, 8):
        with pytest.raises(ValueError, match=said):
            unmasking.estimate(LAW.denoiser(), EVERY_SL[:2], path, budget=budget, seed=0)


def test_a_stage_without_calls_refuses_nothing() -> None:
    path = Hybrid(Remask(rule="cap"), Order("left_to_right"), split=(0, 4))
    assert of_every_text(path, 4).sum().item() == pytest.approx(1, abs=1e-6)


def test_work_is_chunked_by_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Known:
        table_VD = LAW.table_VD
        log_probs_NV = torch.randn(12, 3).log_softmax(-1)

        def __call__(self, state: State) -> Posterior:
            made = Written(state, self.table_VD, self.log_probs_NV)
            made.asked = asked
            return made

    def nats() -> torch.Tensor:
        tokens_BL = EVERY_SL[5:8]
        return unmasking.estimate(Known(), tokens_BL, Masked(), budget=1, seed=0).mean_B

    whole_B = nats()
    assert asked == [12]
    asked.clear()
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 15)  # five positions a chunk
    assert torch.equal(nats(), whole_B)
    assert asked == [5, 5, 2]


def test_texts_may_be_transposed() -> None:
    across = EVERY_SL.T.contiguous().T
    path = EntropyBounded(bound=0.7)
    found, expected = (
        unmasking.estimate(LAW.denoiser(), texts, path, budget=2, seed=0).mean_B
        for texts in (across, EVERY_SL)
    )
    assert torch.equal(found, expected)
