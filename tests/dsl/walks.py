"""A path of every kind and any state to start from, for what must hold on all of them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from dsl.paths import (
    AnyPath,
    EntropyBounded,
    Hybrid,
    Information,
    Masked,
    Order,
    Quantile,
    Remask,
    SecondOrder,
    SentenceSDE,
    TokenSDE,
)
from dsl.state import State
from tests.dsl.laws import random_law

LAW = random_law(tokens=3, length=4, dim=2, seed=3)
SDE = SentenceSDE(gamma_max=20.0)
JVP = TokenSDE(gamma_max=20.0, delta=0.1, curvature="jvp")
PATHS: list[AnyPath] = [
    Masked(alpha="cosine"),
    *(Remask(rule=rule) for rule in ("cap", "rescale", "conf", "loop", "forward_backward")),  # type: ignore[arg-type]
    Order("random"),
    Order((3, 1, 2, 0)),
    EntropyBounded(bound=0.5),
    SDE,
    SentenceSDE(gamma_max=20.0, grid=Quantile(mu=1.0, sigma=1.0)),
    SentenceSDE(gamma_max=20.0, grid=Information(gammas=(0.0, 4.0, 20.0), nats=(0.0, 2.0, 3.0))),
    TokenSDE(gamma_max=20.0, delta=0.1),
    JVP,
    SecondOrder(SDE),
    SecondOrder(JVP),
]
CONTINUOUS = [path for path in PATHS if isinstance(path, SentenceSDE | TokenSDE | SecondOrder)]
HYBRIDS = [
    (SDE, Masked()),
    (JVP, Remask(rule="conf")),
    (SecondOrder(SDE), EntropyBounded(bound=0.5)),
    (Remask(rule="cap"), SDE),
    (Order("random"), TokenSDE(gamma_max=20.0, delta=0.1)),
]
SNRS = [0.0, 1e-8, 0.5, 30.0, 1e8, float("inf")]

states = st.builds(
    lambda tokens, known, snrs: State.from_tokens(
        LAW.table_VD, torch.tensor([tokens]), torch.tensor([known]), torch.tensor([snrs])
    ),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.lists(st.sampled_from(SNRS), min_size=4, max_size=4),
)


@st.composite
def walks(draw: st.DrawFn) -> tuple[AnyPath, int]:
    """Any path with a budget of 1 to 2 L calls."""
    if draw(st.booleans()):
        return draw(st.sampled_from(PATHS)), draw(st.integers(1, 8))
    split = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(any))
    return Hybrid(*draw(st.sampled_from(HYBRIDS)), split=split), sum(split)
