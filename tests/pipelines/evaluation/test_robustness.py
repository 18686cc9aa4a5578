"""The rise of the cross-entropy under wrong tokens is the exact one of a law that is enumerated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsl.noise import Draws
from pipelines.evaluation.questions.robustness import (
    VISIBLE,
    RobustnessConfig,
    nats,
    replace,
)
from tests.dsl.laws import Law, random_law
from tests.pipelines.evaluation.conftest import Run

LAW = random_law(tokens=3, length=6, dim=2, seed=1)
SHARES = (0.34, 0.67, 1.0)  # 1, 2 and 3 of 3 visible tokens


def with_chances(p_S: Tensor) -> Law:
    return Law(table_VD=LAW.table_VD, sequences_SL=LAW.sequences_SL, p_S=p_S)


def each(law: Law, tokens_BL: Tensor, **how: Any) -> dict[float, np.ndarray]:
    """The cross-entropies ``[B]`` with no token replaced and with every share."""
    return {
        share: np.array(nats(law.denoiser(), tokens_BL, replaced=share, **how)["nats"])
        for share in (0.0, *SHARES)
    }


class Watched:
    """The exact denoiser of a law; keeps the states that it is asked about."""

    def __init__(self, law: Law) -> None:
        self.exact, self.table_VD, self.states = law.denoiser(), law.table_VD, []

    def __call__(self, state: Any) -> Any:
        self.states.append(state)
        return self.exact(state)


def enumerated(law: Law, state: Any, tokens_L: Tensor) -> float:
    """Mean -log p(token | visible) over the masked positions of one row, by summing the law."""
    visible_L = state.revealed_BL[0]
    agrees_S = (law.sequences_SL[:, visible_L] == state.tokens_BL[0, visible_L]).all(1)
    p_S = law.p_S * agrees_S / (law.p_S * agrees_S).sum()
    masked = (~visible_L).nonzero().flatten().tolist()
    chances = [p_S[law.sequences_SL[:, at] == tokens_L[at]].sum() for at in masked]
    return -torch.stack(chances).log().mean().item()


def test_the_cross_entropies_are_those_of_the_law() -> None:
    tokens_BL = LAW.draw(20, 0)
    for row in range(len(tokens_BL)):
        denoiser = Watched(LAW)
        found = [
            nats(denoiser, tokens_BL[row : row + 1], replaced=share, seed=3, first_row=row)
            for share in (0.0, *SHARES)
        ]
        clean, *wrong = denoiser.states
        for columns, state in zip(found, denoiser.states, strict=True):
            assert columns["nats"][0] == pytest.approx(
                enumerated(LAW, state, tokens_BL[row]), rel=1e-9
            )
            # Paired: what is masked is the same whatever is replaced.
            assert torch.equal(state.masked_BL, clean.masked_BL)
            assert state.revealed_BL.sum() == 3
        differ = [int((state.tokens_BL != clean.tokens_BL).sum()) for state in wrong]
        assert differ == [1, 2, 3]
        assert torch.equal(clean.tokens_BL[clean.revealed_BL], tokens_BL[row][clean.revealed_BL[0]])


def test_nothing_rises_where_tokens_are_independent() -> None:
    p_V = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    law = with_chances(p_V[LAW.sequences_SL].prod(1))
    clean_B, *wrong = each(law, law.draw(30, 0), seed=0).values()
    for nats_B in wrong:
        assert nats_B == pytest.approx(clean_B, rel=1e-9)


def test_the_law_itself_is_hurt_by_wrong_tokens_and_the_more_the_more() -> None:
    """In expectation any false condition costs at least as much as the true one (Gibbs)."""
    same_S = (LAW.sequences_SL == LAW.sequences_SL[:, :1]).all(1)
    p_S = 0.9 * same_S / same_S.sum() + 0.1 / len(same_S)
    copies = with_chances(p_S.double())
    found = each(copies, copies.draw(4000, 0), seed=0).values()
    clean, *wrong = (values_B.mean() for values_B in found)
    assert clean < wrong[0] < wrong[1] < wrong[2]


def test_figures_do_not_depend_on_batches() -> None:
    tokens_BL = LAW.draw(7, 1)
    whole = each(LAW, tokens_BL, seed=5)
    part = each(LAW, tokens_BL[3:], seed=5, first_row=3)
    for share, values_B in whole.items():
        assert part[share].tolist() == values_B[3:].tolist()
    assert not np.array_equal(each(LAW, tokens_BL, seed=6)[0.0], whole[0.0])


@given(seed=st.integers(0, 99), share=st.floats(0, 1), size=st.integers(2, 9))
def test_only_visible_tokens_are_replaced_and_never_by_themselves(
    seed: int, share: float, size: int
) -> None:
    tokens_BL = torch.arange(5 * 16).reshape(5, 16) % size
    visible_BL = VISIBLE.gamma(5, 16, Draws(seed, 0, 0)).isinf()
    made_BL = replace(tokens_BL, visible_BL, share, size, Draws(seed, 0, 1))
    assert ((made_BL >= 0) & (made_BL < size)).all()
    wrong_BL = made_BL != tokens_BL
    assert not (wrong_BL & ~visible_BL).any()
    assert (wrong_BL.sum(1) == torch.tensor(share * 8).round()).all()
    more_BL = replace(tokens_BL, visible_BL, min(1.0, share + 0.3), size, Draws(seed, 0, 1))
    assert torch.equal(more_BL[wrong_BL], made_BL[wrong_BL])


def test_every_other_token_is_as_likely() -> None:
    tokens_BL, visible_BL = torch.zeros(400, 16).long(), torch.ones(400, 16).bool()
    made_BL = replace(tokens_BL, visible_BL, 1.0, 5, Draws(0, 0, 1))
    counts = torch.bincount(made_BL.flatten(), minlength=5)
    assert counts[0] == 0
    assert counts[1:].tolist() == pytest.approx([1600] * 4, abs=4 * (6400 * 3 / 16) ** 0.5)


def test_every_model_that_sees_masks_is_asked(run: Run, world: Path, tmp_path: Path) -> None:
    models = ", ".join(f"{kind}: {world / kind}" for kind in ("mdlm", "ar", "dsl"))
    code, made, err = run(f"models={{{models}}}", "robustness.replaced=[0.25, 0.5]")
    assert code == 0, err
    rows = json.loads((tmp_path / "judged/report/evaluation.json").read_text())["robustness"]
    assert [(row["model"], row["state"]) for row in rows] == [
        (model, state)
        for model in ("mdlm", "dsl")
        for state in ("replaced 0", "replaced 0.25", "replaced 0.5")
    ]
    for clean, row in ((rows[0], rows[1]), (rows[3], rows[5])):
        assert row["rise"] == pytest.approx(row["nats"] - clean["nats"])
        assert row["rise_stderr"] > 0
        assert made["metrics"][f"{row['model']}/{row['state']}/rise"] == row["rise"]
    assert (tmp_path / "judged/report/robustness.png").exists()


def test_it_can_be_left_out(run: Run, world: Path, tmp_path: Path) -> None:
    code, _, err = run(f"models={{dsl: {world / 'dsl'}}}", "robustness.replaced=[]")
    assert code == 0, err
    assert not (tmp_path / "judged/parts/robustness").exists()
    with pytest.raises(ValueError, match="replaced"):
        RobustnessConfig(replaced=(0.0,))
