"""The divergence of n-grams: against laws that are known, and that diversity does not move it.

Shapes: V tokens, N rows, L positions.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from infra.errors import ConfigError
from pipelines.evaluation.gate import Resamples
from pipelines.evaluation.questions.divergence import (
    Divergence,
    DivergenceConfig,
    NGramDivergence,
    divergence,
    scores,
)
from tests.pipelines.evaluation.conftest import Refused, Run

V, N, LENGTH = 30, 250, 32


def entropy(p: np.ndarray) -> float:
    """In bits."""
    return float(-(p[p > 0] * np.log2(p[p > 0])).sum())


def between(p_V: np.ndarray, q_V: np.ndarray) -> float:
    """The Jensen-Shannon divergence by its definition, in bits."""
    return entropy((p_V + q_V) / 2) - (entropy(p_V) + entropy(q_V)) / 2


def estimate(p_NL: np.ndarray, q_NL: np.ndarray, order: int) -> float:
    return float(divergence(*scores(p_NL, q_NL, order), Resamples(0, 20))[0])


def observed(p_NL: np.ndarray, q_NL: np.ndarray, order: int) -> float:
    """The divergence of the frequencies in the two samples."""
    grams = [
        np.lib.stride_tricks.sliding_window_view(rows_NL, order, axis=1).reshape(-1, order)
        for rows_NL in (p_NL, q_NL)
    ]
    numbers = np.unique(np.concatenate(grams), axis=0, return_inverse=True)[1].ravel()
    p_G, q_G = (
        np.bincount(side, minlength=numbers.max() + 1) / len(side)
        for side in np.split(numbers, [len(grams[0])])
    )
    return between(p_G, q_G)


def draw(chain_VV: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Texts of a Markov chain, ``[N, L]``."""
    cdf_VV, texts_NL = chain_VV.cumsum(1), np.zeros((N, LENGTH), int)
    texts_NL[:, 0] = generator.integers(V, size=N)
    for place in range(1, LENGTH):
        below_NV = cdf_VV[texts_NL[:, place - 1]] < generator.random((N, 1))
        texts_NL[:, place] = np.minimum(below_NV.sum(1), V - 1)
    return texts_NL


def test_independent_tokens_have_the_divergence_of_their_laws() -> None:
    generator = np.random.default_rng(0)
    p_V, q_V = generator.dirichlet(np.ones(V), 2)
    p_NL, q_NL = (generator.choice(V, (N, LENGTH), p=law_V) for law_V in (p_V, q_V))
    true = between(p_V, q_V)
    assert estimate(p_NL, q_NL, 1) == pytest.approx(true, abs=0.02)
    assert true < estimate(p_NL, q_NL, 2) + 0.02  # pairs tell more than single tokens
    assert estimate(p_NL, q_NL + V, 1) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("spread", [0.1, 0.3, 1.0])
def test_the_floor_is_the_least_that_texts_can_reach(spread: float, order: int) -> None:
    """Whatever the law of real text is, from a sharp one to a flat one: neither sharper nor flatter
    nor noisier texts come below real ones. By the frequencies that are observed they do."""
    generator = np.random.default_rng(0)
    real_VV = generator.dirichlet(np.full(V, spread), V)

    def rows(sharper: float, noise: float = 0.0) -> tuple[float, float]:
        """Our estimate and the observed divergence, means over three pairs of samples."""
        law_VV = real_VV**sharper
        law_VV = (1 - noise) * law_VV / law_VV.sum(1, keepdims=True) + noise / V
        pairs = [(draw(law_VV, generator), draw(real_VV, generator)) for _ in range(3)]
        found = [(estimate(*pair, order), observed(*pair, order)) for pair in pairs]
        ours, plain = np.mean(found, axis=0).tolist()
        return ours, plain

    floor, plain_floor = rows(1)
    assert floor == pytest.approx(0, abs=0.001)
    changed = {sharper: rows(sharper) for sharper in (0.5, 0.8, 0.95, 1.05, 1.2, 1.5, 4)}
    assert min(ours for ours, _ in changed.values()) > floor - 0.001
    assert rows(1, noise=0.03)[0] > floor - 0.001
    assert changed[4][0] > max(changed[1.5][0], floor) + 0.02
    if order == 4:
        assert changed[1.5][1] < plain_floor - 0.01


def test_rows_are_not_scored_by_what_they_say_themselves() -> None:
    generator = np.random.default_rng(0)
    p_NL, q_NL = generator.integers(0, 5, (40, 8)), generator.integers(0, 4, (40, 8))
    before_N, _ = scores(p_NL, q_NL, 2)
    p_NL[3] = 2
    after_N, _ = scores(p_NL, q_NL, 2)
    fold = np.arange(40) % 5 == 3
    others = fold & (np.arange(40) != 3)
    np.testing.assert_array_equal(before_N[others], after_N[others])
    assert (before_N[~fold] != after_N[~fold]).any()


def test_the_gate_compares_it() -> None:
    generator = np.random.default_rng(0)
    far, near, real = (generator.integers(0, top, (N, 8)) for top in (5, 9, 9))
    found = {}
    for model, rows_NL in (("far", far), ("near", near)):
        p_N, q_N = scores(rows_NL, real, 1)
        found[f"parts/divergence/{model}"] = {"texts_1": p_N, "references_1": q_N}
    survey: Any = SimpleNamespace(source=lambda model, *_: model, columns=found.__getitem__)
    survey.config = SimpleNamespace(divergence=DivergenceConfig(orders=(1,)))
    metric = NGramDivergence(path="masked", budget=8, order=1)
    far_R, near_R = (metric.figures(survey, m, Resamples(0, 50)) for m in ("far", "near"))
    assert metric.sign * (near_R - far_R).min() > 0
    metric.require(survey, "far")
    with pytest.raises(ConfigError, match="2-grams"):
        NGramDivergence(path="masked", budget=8, order=2).require(survey, "far")


def test_every_source_has_a_row_and_real_text_is_the_floor(
    run: Run, world: Path, tmp_path: Path
) -> None:
    argv = [f"models={{flat: {world / 'flat'}}}", "samples={rows: 40}", "divergence.orders=[1, 3]"]
    code, made, err = run(*argv, "paths={masked: {path: masked, budgets: [1]}}")
    assert code == 0, err
    rows = json.loads((tmp_path / "judged/report/evaluation.json").read_text())["divergence"]
    assert [row["model"] for row in rows] == ["unigram", "real", "flat"]
    unigram, real, flat = rows
    assert abs(real["js_1"]) < 0.02 < flat["js_1"]
    assert unigram["js_3"] > real["js_3"] + 0.05
    for row in rows:
        assert row["js_3_low"] <= row["js_3"] <= row["js_3_high"]
    assert made["metrics"]["flat/masked/1/js_1"] == flat["js_1"]
    plots = {path.name for path in (tmp_path / "judged/report").glob("js_*.png")}
    assert plots == {"js_1_by_calls.png", "js_3_by_calls.png"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["divergence={}"], ["needs at least 20 texts", "samples.rows is 6"]),
        (["samples.rows=40", "divergence.orders=[33]"], ["divergence.orders", "hold 32 tokens"]),
        (["samples.rows=40", "divergence.orders=[]"], ["divergence", "orders"]),
        (["samples.rows=40", "divergence.orders=[2,1,2]"], ["divergence", "orders holds 2 twice"]),
    ],
)
def test_what_cannot_be_measured_is_one_message(
    refused: Refused, argv: list[str], words: list[str]
) -> None:
    refused(["models={a: WORLD/dsl}", *argv], 2, words)


def test_real_text_is_not_compared_with_itself() -> None:
    nothing = {"texts_1": np.zeros(0), "references_1": np.zeros(0)}
    survey: Any = SimpleNamespace(
        columns=lambda group: nothing,
        walked=(),
        config=SimpleNamespace(
            beside=("unigram", "real"),
            divergence=DivergenceConfig(orders=(1,)),
            samples=SimpleNamespace(rows=40),
            seed=0,
        ),
    )
    rows = Divergence().tables(survey)["divergence"].rows
    assert [dict(row) for row in rows] == [{"model": "unigram"}, {"model": "real"}]
