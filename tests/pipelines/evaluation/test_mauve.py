"""MAUVE is mauve-text's, number for number, and the closed forms of known histograms."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from infra import config
from infra.errors import DataError
from infra.storage import Folder
from pipelines.evaluation.features import Features, HubFeaturizer, OwnFeaturizer
from pipelines.evaluation.parts import Parts, lists
from pipelines.evaluation.questions import mauve
from pipelines.evaluation.questions.mauve import LEAST, MauveConfig
from tests.pipelines import tiny
from tests.pipelines.evaluation import strangers

WIDTH = 12


def normal(seed: int, rows: int = LEAST, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (rows, WIDTH)).astype(np.float32)


def blobs(counts: tuple[int, ...], seed: int) -> np.ndarray:
    """Rows near the corners of a simplex, so many at each, in no order."""
    rng = np.random.default_rng(seed)
    corner_N = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    rows_NF = 10 * np.eye(WIDTH)[corner_N] + rng.normal(0, 0.01, (sum(counts), WIDTH))
    return rows_NF.astype(np.float32)


def area(p_K: np.ndarray, q_K: np.ndarray, scaling: float) -> float:
    """Between the axes and the curve (exp -c KL(q|r), exp -c KL(p|r)), r from p to q."""

    def kl(a_K: np.ndarray, b_K: np.ndarray) -> float:
        on = a_K > 0
        return float((a_K[on] * np.log(a_K[on] / b_K[on])).sum())

    mixtures = [w * p_K + (1 - w) * q_K for w in np.linspace(1e-6, 1 - 1e-6, 25)]
    inner = [(math.exp(-scaling * kl(q_K, r)), math.exp(-scaling * kl(p_K, r))) for r in mixtures]
    x, y = np.array([(0.0, 1.0), *inner[::-1], (1.0, 0.0)]).T
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def test_the_numbers_are_those_of_mauve_text() -> None:
    from mauve import compute_mauve

    p_NF, q_MF = normal(0), normal(1, 620, 0.3)
    found = mauve.per_seed(p_NF, q_MF, MauveConfig())
    theirs = [
        float(compute_mauve(p_features=p_NF, q_features=q_MF, seed=seed).mauve)
        for seed in range(25, 30)
    ]
    assert found == theirs
    assert len(set(theirs)) == 5
    assert mauve.one(p_NF, q_MF, MauveConfig(), 26) == theirs[1]


def test_settings_reach_mauve_text() -> None:
    from mauve import compute_mauve

    p_NF, q_MF = normal(0), normal(1, shift=0.3)
    theirs = compute_mauve(
        p_features=p_NF, q_features=q_MF, seed=25, num_buckets=17, mauve_scaling_factor=2
    )
    found = mauve.one(p_NF, q_MF, MauveConfig(buckets=17, scaling=2.0), 25)
    assert found == float(theirs.mauve)


def test_texts_give_what_mauve_text_makes_of_them(tmp_path: Path) -> None:
    from mauve import compute_mauve

    folder = strangers.gpt2(tmp_path / "gpt2")
    p, q = [[tiny.spelled(n) for n in range(start, start + LEAST)] for start in (0, 900)]
    theirs = compute_mauve(
        p_text=p, q_text=q, featurize_model_name=str(folder), max_text_length=16, seed=25
    )
    featurizer = HubFeaturizer(model=str(folder), max_tokens=16, batch=64)
    featurize = featurizer.load(mauve.READER, "cpu")
    p_NF, q_MF = (featurize(texts, np.zeros((LEAST, 0))).features_NF for texts in (p, q))
    found = mauve.one(p_NF, q_MF, MauveConfig(), 25)
    assert 0.01 < found < 0.99
    assert found == pytest.approx(float(theirs.mauve), abs=0.02)  # features round otherwise


def test_identical_sets_score_one() -> None:
    assert mauve.per_seed(normal(0), normal(0), MauveConfig()) == pytest.approx([1] * 5)


def test_disjoint_sets_score_the_least_there_is() -> None:
    p_NF, q_MF = blobs((250, 250), 0), blobs((0, 0, 250, 250), 1)
    found = mauve.per_seed(p_NF, q_MF, MauveConfig(buckets=4))
    half = np.array([0.5, 0.5, 0, 0])
    assert found == pytest.approx([area(half, half[::-1], 5.0)] * 5, rel=1e-6)
    # Without the 25 points of the curve: c B(c + 1, c), which is 1 / 252 at c = 5.
    assert found[0] == pytest.approx(1 / 252, rel=0.05)


@pytest.mark.parametrize("order", [0, 1])
def test_known_histograms_give_their_area_in_any_order(order: int) -> None:
    p_NF = blobs((300, 150, 50), 2 * order)
    q_MF = blobs((100, 250, 250), 2 * order + 1)
    found = mauve.per_seed(p_NF, q_MF, MauveConfig(buckets=3))
    expected = area(np.array([0.6, 0.3, 0.1]), np.array([100, 250, 250]) / 600, 5.0)
    assert found == pytest.approx([expected] * 5, rel=1e-6)


@pytest.mark.parametrize(
    ("p_NF", "q_MF", "settings", "why"),
    [
        (normal(0, 499), normal(1), {}, "below 500 texts on either side: there are 499, and 500"),
        (normal(0), normal(1, 3), {}, "there are 500, and 3 references"),
        (normal(0), normal(1)[:, :5], {}, r"\(500, 12\) and \(500, 5\) come from different"),
        (normal(0) * np.nan, normal(1), {}, "infinite or NaN"),
        (normal(0), normal(1), {"buckets": 501}, "501 buckets are too many for 500 texts"),
    ],
)
def test_what_means_nothing_is_refused(
    p_NF: np.ndarray, q_MF: np.ndarray, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        mauve.per_seed(p_NF, q_MF, MauveConfig(**settings))


def test_a_featurizer_that_overflows_is_said_before_anything_is_scored() -> None:
    found = Features(np.array([[1.0, math.inf]]), np.array([8]))
    workspace: Any = SimpleNamespace(reader=lambda *_: lambda texts, tokens_NL: found)
    given = OwnFeaturizer(model="runs/broken"), workspace, [""], np.zeros((1, 8), int)
    with pytest.raises(DataError, match=r"mauve.featurizer.model: .*runs/broken.* infinite or NaN"):
        mauve._features(*given)


def test_only_texts_of_equal_length_are_scored() -> None:
    """64 tokens each beside 64, 63 (a cut at the end) and 40."""
    features_NF = {"parts/features/references": normal(0), "parts/features/dsl": normal(1)}

    def score(tokens: int) -> Any:
        def rows(group: str, first: int, count: int, columns: list[str]) -> pa.Table:
            size = 64 if group.endswith("references") else tokens
            column = lists(features_NF[group])
            return pa.table({"features": column, "tokens": np.full(LEAST, size)})

        asked = SimpleNamespace(mauve=MauveConfig(), samples=SimpleNamespace(rows=LEAST))
        workspace: Any = SimpleNamespace(config=asked, parts=SimpleNamespace(rows=rows))
        return mauve._score(workspace, source="dsl", first=0)["mauve"].to_pylist()[0]

    assert score(64) == score(63) == mauve.per_seed(normal(1), normal(0), MauveConfig())
    assert score(40) is None


def test_a_repeat_that_is_left_out_leaves_the_others_readable(tmp_path: Path) -> None:
    """Also where it was kept without a type."""
    parts = Parts(Folder.at(str(tmp_path)))
    group, scores = "parts/mauve/dsl", [0.5, 0.4]
    asked = SimpleNamespace(mauve=MauveConfig(), samples=SimpleNamespace(rows=LEAST))
    references = {"features": lists(normal(0)), "tokens": np.full(LEAST, 64)}
    parts.write("parts/features/references", 0, pa.table(references), {})
    workspace: Any = SimpleNamespace(config=asked, parts=parts)
    left_out = mauve._score(workspace, source="references", first=0)
    parts.write(group, 0, pa.table({"mauve": [scores]}), {})
    for number, kept in enumerate((left_out, pa.table({"mauve": [None]})), 1):
        parts.write(group, number, kept, {})
    assert parts.one(group, 1).schema == parts.one(group, 0).schema
    assert parts.read(group)["mauve"].to_pylist() == [scores, None, None]


@pytest.mark.parametrize("wrong", [{"seeds": 4}, {"scaling": 0.0}, {"buckets": 1}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MauveConfig(**wrong)


def test_a_configuration_holds_either_featurizer() -> None:
    def load(*given: str) -> MauveConfig:
        return config.load(MauveConfig, verb="evaluate", argv=given, presets=Path())

    assert load() == MauveConfig(featurizer=HubFeaturizer(model="gpt2-large", max_tokens=1024))
    own = load("featurizer={kind: own, model: runs/ar, pooling: mean}", "seeds=7")
    featurizer = OwnFeaturizer(model="runs/ar", pooling="mean")
    assert own == MauveConfig(featurizer=featurizer, seeds=7)


def test_the_terminal_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    mauve.one(normal(0), normal(1), MauveConfig(), 25)
    assert capfd.readouterr() == ("", "")
