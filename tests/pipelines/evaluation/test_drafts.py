"""On half-finished texts of its own the exact posterior is as sure as on real ones, and a sharpened
one is surer."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

import dsl
from dsl.noise import Draws
from dsl.paths import Order
from dsl.posterior import Denoises, Posterior
from dsl.state import State
from dsl.truncation import Truncated
from pipelines.evaluation.conditions import Revealed
from pipelines.evaluation.questions.drafts import LATER, DraftsConfig, sureness
from tests.dsl.laws import random_law
from tests.pipelines.evaluation.conftest import Refused, Run

LAW = random_law(tokens=3, length=5, dim=2, seed=1, sharpness=3.0)
ROWS = 3000
SHARES = (0.4, 0.6, 0.8)  # 2, 3 and 4 of 5 tokens
EXACT, SHARP = LAW.denoiser(), Truncated(LAW.denoiser(), 0.5)


@cache
def own(denoiser: Denoises) -> Tensor:
    """Texts that a denoiser draws, one token a call."""
    start = State.masked(ROWS, 5, 2)
    return dsl.sample(denoiser, Order("random"), start, budget=5, seed=7).tokens_BL


def both(denoiser: Any, tokens_BL: Tensor, share: float) -> tuple[np.ndarray, np.ndarray]:
    found = sureness(denoiser, tokens_BL, revealed=share, seed=3)
    return found["entropy"], found["nats"]


def apart(one_N: np.ndarray, other_N: np.ndarray) -> float:
    """How far two means are apart, in standard errors."""
    error = math.hypot(one_N.std(), other_N.std()) / math.sqrt(len(one_N))
    return float((one_N.mean() - other_N.mean()) / error)


def test_both_figures_are_those_of_the_law() -> None:
    tokens_BL = LAW.draw(20, 0)
    for row, tokens_L in enumerate(tokens_BL):
        found = sureness(EXACT, tokens_L[None], revealed=0.6, seed=3, first_row=row)  # type: ignore[arg-type]
        kept_L = Revealed(share=0.6).gamma(1, 5, Draws(3, row, LATER))[0].isinf()
        assert kept_L.sum() == 3
        agrees_S = (LAW.sequences_SL[:, kept_L] == tokens_L[kept_L]).all(1)
        p_S = LAW.p_S * agrees_S / (LAW.p_S * agrees_S).sum()
        entropies, nats = [], []
        for at in (~kept_L).nonzero().flatten().tolist():
            p_V = torch.zeros(3).double().index_add(0, LAW.sequences_SL[:, at], p_S)
            entropies.append(-(p_V * p_V.log()).sum())
            nats.append(-p_V[tokens_L[at]].log())
        assert found["entropy"][0] == pytest.approx(float(sum(entropies)) / 2, rel=1e-9)
        assert found["nats"][0] == pytest.approx(float(sum(nats)) / 2, rel=1e-9)


@pytest.mark.parametrize("share", SHARES)
def test_the_exact_posterior_is_as_sure_of_its_own_texts_as_of_real_ones(share: float) -> None:
    own_entropy_N, own_nats_N = both(EXACT, own(EXACT), share)
    entropy_N, nats_N = both(EXACT, LAW.draw(ROWS, 0), share)
    assert abs(apart(own_entropy_N, entropy_N)) < 4
    assert abs(apart(own_nats_N, nats_N)) < 4
    # And it is as often right as it is sure.
    assert abs(apart(own_nats_N, own_entropy_N)) < 4


@pytest.mark.parametrize("share", SHARES)
def test_a_sharpened_model_is_surer_of_its_own_texts(share: float) -> None:
    drafts_NL, real_NL = own(SHARP), LAW.draw(ROWS, 0)
    for asked in (SHARP, EXACT):
        (own_entropy_N, own_nats_N), (entropy_N, nats_N) = (
            both(asked, tokens_NL, share) for tokens_NL in (drafts_NL, real_NL)
        )
        assert apart(own_entropy_N, entropy_N) < -3
        assert apart(own_nats_N, nats_N) < -3
    # Of real text the sharpened model is surer than it is right.
    entropy_N, nats_N = both(SHARP, real_NL, share)
    assert apart(nats_N, entropy_N) > 5


def test_what_is_hidden_does_not_depend_on_the_walk() -> None:
    """Of 3 of 5 tokens that a path would have revealed first, 9/5 are kept by chance."""
    asked = []

    class Watched:
        table_VD = EXACT.table_VD

        def __call__(self, state: State) -> Posterior:
            asked.append(state)
            return EXACT(state)

    sureness(Watched(), LAW.draw(500, 0), revealed=0.6, seed=3)  # type: ignore[arg-type]
    for step in range(5):
        first_BL = Revealed(share=0.6).gamma(500, 5, Draws(3, 0, step)).isinf()
        both_B = (first_BL & asked[0].revealed_BL).sum(1).double()
        assert abs(both_B.mean() - 9 / 5) < 5 * both_B.std() / 500**0.5


def test_figures_do_not_depend_on_batches() -> None:
    tokens_BL = LAW.draw(7, 1)
    whole_B, _ = both(EXACT, tokens_BL, 0.5)
    part = sureness(EXACT, tokens_BL[3:], revealed=0.5, seed=3, first_row=3)  # type: ignore[arg-type]
    assert list(part["entropy"]) == list(whole_B[3:])


def test_every_model_that_sees_masks_is_asked_of_its_own_texts(
    run: Run, world: Path, tmp_path: Path
) -> None:
    models = ", ".join(f"{kind}: {world / kind}" for kind in ("mdlm", "ar", "dsl"))
    code, made, err = run(
        f"models={{{models}}}",
        "paths={masked: {path: masked, budgets: [2, 4]}}",
        "drafts={revealed: [0.25, 0.5], rows: 4}",
    )
    assert code == 0, err
    report = tmp_path / "judged/report"
    rows = json.loads((report / "evaluation.json").read_text())["drafts"]
    assert [(row["model"], row["path"], row["state"]) for row in rows] == [
        (model, path, state)
        for model in ("mdlm", "dsl")
        for state in ("revealed 0.25", "revealed 0.5")
        for path in ("real", "masked")
    ]
    for real, drawn in (rows[:2], rows[2:4]):
        assert drawn["budget"] == 4
        assert drawn["nats_less"] == pytest.approx(real["nats"] - drawn["nats"])
        assert drawn["overconfidence"] == pytest.approx(drawn["nats"] - drawn["entropy"])
        assert drawn["entropy_stderr"] > 0
        assert "nats_less" not in real
    assert made["metrics"]["dsl/revealed 0.5/masked/4/entropy"] == rows[-1]["entropy"]
    assert (report / "drafts.png").exists()
    # The parts hold no more texts than were asked for.
    parts = sorted((tmp_path / "judged/parts/drafts/dsl/real/0.5").iterdir())
    assert [part.name for part in parts] == ["00000000.parquet"]
    assert [pq.read_metadata(part).num_rows for part in parts] == [4]


@pytest.mark.parametrize("wrong", ["revealed=[]", "revealed=[1.0]", "rows=1"])
def test_impossible_settings_are_one_message(refused: Refused, wrong: str) -> None:
    assert DraftsConfig() == DraftsConfig(revealed=(0.25, 0.5, 0.75), rows=256)
    refused(["models={a: WORLD/dsl}", f"drafts.{wrong}"], 2, ["drafts", wrong.partition("=")[0]])
