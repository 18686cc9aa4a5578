"""Every path draws from the law, given calls enough, and comes closer to it with every call.

Shapes: B rows, L positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsl.paths import (
    EntropyBounded,
    Hybrid,
    Masked,
    Order,
    Quantile,
    Remask,
    SecondOrder,
    SentenceSDE,
    TokenSDE,
)
from dsl.sampling import sample
from dsl.state import State
from tests.dsl.laws import (
    Law,
    cyclic,
    law_p,
    random_law,
    total_variation,
    total_variation_bound,
)

CYCLIC = cyclic(5)
# All 27 texts are possible, some rarely.
WEIGHTED = random_law(tokens=3, length=3, dim=2, seed=3)
WEIGHTED = replace(WEIGHTED, table_VD=CYCLIC.table_VD[[0, 2, 4]])

LOG = SentenceSDE(gamma_max=80.0, grid="log")
ENDPOINT = [Masked(), Masked(alpha="cosine"), *(Remask(rule=r) for r in ("cap", "rescale", "loop"))]  # type: ignore[arg-type]
ENDPOINT.append(Remask(rule="forward_backward"))
CONTINUOUS = [
    LOG,
    SentenceSDE(gamma_max=80.0, grid=Quantile(mu=1.5, sigma=1.5)),
    SecondOrder(LOG),
    TokenSDE(gamma_max=80.0, delta=0.02),
    TokenSDE(gamma_max=80.0, delta=0.02, curvature="jvp"),
]
SEQUENTIAL = [Order("random"), Order("left_to_right"), EntropyBounded(bound=0.02)]
ROWS = 2000


def draw(law: Law, path: Any, budget: int, rows: int = ROWS) -> Tensor:
    state = State.masked(rows, law.sequences_SL.shape[1], 2)
    return sample(law.denoiser(), path, state, budget=budget, seed=5).tokens_BL


@pytest.mark.parametrize("law", [CYCLIC, WEIGHTED], ids=["cyclic", "weighted"])
@pytest.mark.parametrize("path", ENDPOINT, ids=repr)
def test_endpoint_paths(path: Any, law: Law) -> None:
    """Two tokens revealed at once are drawn apart, a chance that falls with the budget."""
    made_BL = draw(law, path, 300)
    assert total_variation(law, made_BL) < total_variation_bound(law, ROWS)
    assert (law.index(made_BL) < len(law.p_S)).double().mean() > 0.98
    assert total_variation(law, draw(law, path, 3)) > total_variation_bound(law, ROWS)


@pytest.mark.parametrize("law", [CYCLIC, WEIGHTED], ids=["cyclic", "weighted"])
@pytest.mark.parametrize("path", CONTINUOUS, ids=repr)
def test_continuous_paths(path: Any, law: Law) -> None:
    rows = 800
    assert law_p(law, draw(law, path, 140, rows)) > 1e-3


@pytest.mark.parametrize("law", [CYCLIC, WEIGHTED], ids=["cyclic", "weighted"])
@pytest.mark.parametrize("path", SEQUENTIAL, ids=repr)
def test_sequential_paths(path: Any, law: Law) -> None:
    """One token at a time with exact conditionals is the law itself."""
    assert law_p(law, draw(law, path, law.sequences_SL.shape[1], 2 * ROWS)) > 1e-3


@pytest.mark.parametrize("law", [CYCLIC, WEIGHTED], ids=["cyclic", "weighted"])
def test_hybrid(law: Law) -> None:
    path = Hybrid(SentenceSDE(gamma_max=8.0, grid="log"), Order("random"), split=(60, 5))
    assert law_p(law, draw(law, path, 65)) > 1e-3


def test_confidence_driven_re_masking_needs_more_calls() -> None:
    """A whole token per row and call goes back until half is revealed, however many the calls."""
    distances = [
        total_variation(CYCLIC, draw(CYCLIC, Remask(rule="conf"), calls)) for calls in (8, 64, 400)
    ]
    assert distances[0] > 2 * distances[1] > 2 * distances[2]
    made_BL = draw(WEIGHTED, Remask(rule="conf"), 300)
    assert total_variation(WEIGHTED, made_BL) < total_variation_bound(WEIGHTED, ROWS)


@pytest.mark.parametrize(("order", "reached"), [("plain", 0.2), ("second", 0.08)])
def test_the_distance_falls_with_the_budget(order: str, reached: float) -> None:
    path: Any = SentenceSDE(gamma_max=40.0)
    path = SecondOrder(path) if order == "second" else path
    distances = [total_variation(WEIGHTED, draw(WEIGHTED, path, calls)) for calls in (8, 24, 72)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < reached


def test_the_law_is_told_apart_from_another() -> None:
    """The yardstick itself: a wrong denoiser fails it."""
    other = random_law(tokens=3, length=3, dim=2, seed=4)
    made_BL = sample(
        replace(WEIGHTED, p_S=other.p_S).denoiser(),
        Order("random"),
        State.masked(ROWS, 3, 2),
        budget=3,
        seed=0,
    ).tokens_BL
    assert law_p(WEIGHTED, made_BL) < 1e-6
    assert torch.isfinite(torch.tensor(total_variation(WEIGHTED, made_BL)))
