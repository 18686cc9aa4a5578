"""The gate: what its intervals cover, which way each metric points, and what it lets through."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluation import gate, pages, promotion
from pipelines.evaluation.gate import Decision, Metric, Resamples
from pipelines.evaluation.parts import lists
from pipelines.evaluation.questions import mauve
from pipelines.evaluation.questions.judge import GenerativePerplexity
from pipelines.evaluation.questions.judges import JudgedBits
from pipelines.evaluation.questions.likelihood import Nats
from pipelines.evaluation.questions.mauve import MauveGain
from pipelines.evaluation.questions.texts import EntropyGap, WordShare
from pipelines.evaluation.settings import GateConfig
from pipelines.kinds import AR, MDLM

N = 400
TEXTS = {"path": "masked", "budget": 8}
NATS = Nats()


@dataclass
class Made:
    """What a gate reads of an evaluation, from arrays by model; the references are "real"."""

    nats_N: dict[str, np.ndarray] = field(default_factory=dict)
    judged_2N: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    words_2N: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    entropies_N: dict[str, np.ndarray] = field(default_factory=dict)
    features_NF: dict[str, np.ndarray] = field(default_factory=dict)
    tokens_N: dict[str, np.ndarray] = field(default_factory=dict)
    kinds = MappingProxyType({"old": MDLM, "new": MDLM, "ar": AR})
    config = SimpleNamespace(
        mauve=None,
        samples=SimpleNamespace(rows=N),
        likelihood=SimpleNamespace(rows=N, unmasking_rows=3),
    )

    def source(self, model: str, path: str, budget: int) -> str:
        assert (path, budget) == ("masked", 8)
        return model

    def columns(self, group: str) -> dict[str, np.ndarray]:
        _, question, model, *view = group.replace("judges/ngram", "judged").split("/")
        model = {"references": "real"}.get(model, model)
        if question == "likelihood":
            assert view == ["exact" if self.kinds[model] is AR else "endpoint_bound"]
            return {"nats": self.nats_N[model]}
        if question == "judged":
            nats_N, tokens_N = self.judged_2N[model]
            return {"nats_N": nats_N, "tokens_N": tokens_N, "bytes_N": tokens_N}
        known_N, words_N = self.words_2N.get(model, (None, None))
        return {"known": known_N, "words": words_N, "entropy": self.entropies_N.get(model)}

    @property
    def parts(self) -> Made:
        return self

    def rows(self, group: str, first: int, count: int, columns: list[str]) -> pa.Table:
        model = {"parts/features/references": "real"}.get(group, group.rpartition("/")[2])
        features_NF = self.features_NF[model]
        tokens_N = self.tokens_N.get(model, np.full(len(features_NF), 64))
        return pa.table({"features": lists(features_NF), "tokens": tokens_N})


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """What k-means would have got, but for a stand-in: less the further apart the means are."""
    asked = []

    def one(p_NF: np.ndarray, q_MF: np.ndarray, config: None, seed: int) -> float:
        asked.append((p_NF, q_MF, seed))
        return float(np.exp(-np.abs(p_NF.mean(0) - q_MF.mean(0)).sum()))

    monkeypatch.setattr(mauve, "one", one)
    return asked


def decide(scores: Made, metric: Metric, *guards: Metric, seed: int = 0) -> Decision:
    config = GateConfig(model="new", metric=metric, guards=guards, resamples=200)
    return gate.compare(scores, config, candidate="new", other="old", seed=seed)


def noise(seed: int, size: int = N) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size)


def nats(better_by: float) -> Made:
    """Rows differ by far more than the models do: only in pairs can that be seen."""
    rows_N = 5 + noise(0)
    return Made(nats_N={"old": rows_N, "new": rows_N - better_by + 0.1 * noise(1)})


# --- the interval --------------------------------------------------------------------------------


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    config = GateConfig(model="new", metric=NATS, confidence=0.9, resamples=200)
    covered, runs, truth = 0, 300, 0.3
    for seed in range(runs):
        rows_N = noise(2 * seed, 80)
        new_N = rows_N - truth + noise(2 * seed + 1, 80)
        scores = Made(nats_N={"old": rows_N, "new": new_N})
        found = gate.compare(scores, config, candidate="new", other="old", seed=seed).metric
        covered += found.low <= truth <= found.high
    # Four standard errors of a share of 0.9, and what percentiles of 80 rows fall short by.
    assert 0.9 - 0.07 - 0.02 < covered / runs < 0.9 + 0.07


def test_the_interval_is_that_of_the_textbook() -> None:
    scores = nats(better_by=0.05)
    found = decide(scores, NATS).metric
    differences_N = scores.nats_N["old"] - scores.nats_N["new"]
    assert found.difference == pytest.approx(differences_N.mean())
    assert found.candidate == pytest.approx(scores.nats_N["new"].mean())
    width = 2 * 1.96 * differences_N.std(ddof=1) / math.sqrt(N)
    assert found.high - found.low == pytest.approx(width, rel=0.2)


@given(seed=st.integers(0, 2**64 - 1))
def test_the_same_seed_draws_the_same(seed: int) -> None:
    draws, again = Resamples(seed, 30), Resamples(seed, 30)
    rows_RN = draws.rows(7)
    assert rows_RN.shape == (31, 7)
    assert rows_RN[0].tolist() == list(range(7))
    assert set(np.unique(rows_RN)) <= set(range(7))
    assert (again.rows(7) == rows_RN).all()
    assert again.seeds() == draws.seeds()
    assert all(0 <= number < 2**31 for number in draws.seeds())
    assert not (draws.references(7)[1:] == rows_RN[1:]).all()
    assert not (Resamples(seed ^ 1, 30).rows(7)[1:] == rows_RN[1:]).all()


def test_the_draws_are_pinned() -> None:
    """A decision can be made again only as long as these stay."""
    assert Resamples(3, 2).rows(5)[1:].tolist() == [[0, 4, 0, 1, 0], [4, 2, 0, 0, 0]]


def test_every_row_is_as_likely() -> None:
    times = np.bincount(Resamples(1, 4000).rows(5)[1:].ravel()) / 4000
    assert times == pytest.approx(np.ones(5), abs=0.08)


def test_resampled_ratios_are_of_sums() -> None:
    parts, wholes = np.array([1.0, 0.0, 6.0]), np.array([2.0, 0.0, 8.0])
    rows = np.array([[0, 1, 2], [0, 0, 2], [1, 1, 1]])
    ratios = gate.ratios(parts, wholes, rows)
    assert ratios[:2] == pytest.approx([7 / 10, 8 / 12])
    assert math.isnan(ratios[2])
    assert gate.means(parts, rows) == pytest.approx([7 / 3, 8 / 3, 0])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=2, max_size=12))
def test_resampled_ratios_equal_direct_computation(rows: list[tuple[int, int]]) -> None:
    parts_N, wholes_N = np.array(rows).T
    rows_RN = Resamples(5, 20).rows(len(rows))
    direct = [parts_N[n].sum() / wholes_N[n].sum() for n in rows_RN]
    assert gate.ratios(parts_N, wholes_N, rows_RN) == pytest.approx(direct)


@given(
    st.lists(st.floats(-9, 9) | st.just(math.nan), min_size=1, max_size=60), st.floats(0.5, 0.99)
)
def test_what_is_not_known_widens_the_interval(values: list[float], confidence: float) -> None:
    low, high = gate.percentiles(np.array(values), confidence)
    assert low <= high
    for known in (-9.0, 0.0, 9.0):
        filled = np.where(np.isnan(values), known, values)
        ends = np.quantile(filled, ((1 - confidence) / 2, (1 + confidence) / 2))
        assert low - 1e-9 <= ends[0]
        assert ends[1] <= high + 1e-9
    if not np.isnan(values).any():
        assert (low, high) == pytest.approx(ends)


def test_too_many_unknown_values_leave_no_interval() -> None:
    values_R = np.arange(100.0)
    values_R[[3, 50]] = math.nan
    assert all(map(math.isfinite, gate.percentiles(values_R, 0.95)))
    values_R[[4, 5]] = math.nan
    assert gate.percentiles(values_R, 0.95) == (-math.inf, math.inf)


# --- each metric points the right way ------------------------------------------------------------


def judged(better_by: float) -> Made:
    tokens_N = np.random.default_rng(3).integers(5, 50, N)
    nats_N = tokens_N * (3 + 0.2 * noise(4))
    new = nats_N - better_by * tokens_N
    return Made(judged_2N={"old": (nats_N, tokens_N), "new": (new, tokens_N)})


def words(better_by: float) -> Made:
    draws = np.random.default_rng(5)
    all_N = draws.integers(5, 30, N)
    counts = {"old": draws.binomial(all_N, 0.6), "new": draws.binomial(all_N, 0.6 + better_by)}
    return Made(words_2N={model: (known_N, all_N) for model, known_N in counts.items()})


def entropies(better_by: float, *, side: int) -> Made:
    """Texts as far from real ones as 1, less by what is better, on either side of them."""
    far = {"real": 0.0, "old": 1.0, "new": 1.0 - better_by}
    rows_N = 0.1 * noise(6)
    return Made(entropies_N={model: 4 + side * off + rows_N for model, off in far.items()})


def features(better_by: float) -> Made:
    rows_NF = np.random.default_rng(7).normal(size=(N, 3))
    off = {"real": 0.0, "old": 0.5, "new": 0.5 - better_by}
    return Made(features_NF={model: rows_NF + value for model, value in off.items()})


@pytest.mark.parametrize(
    ("metric", "make"),
    [
        (NATS, nats),
        (GenerativePerplexity(**TEXTS), judged),
        (JudgedBits(**TEXTS, judge="ngram"), judged),
        (WordShare(**TEXTS), words),
        (EntropyGap(**TEXTS), partial(entropies, side=1)),
        (EntropyGap(**TEXTS), partial(entropies, side=-1)),
        (MauveGain(**TEXTS, resamples=40), features),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_better_is_accepted_and_worse_or_the_same_is_not(metric: Metric, make) -> None:
    better = decide(make(0.1), metric)
    assert better.accepted
    assert better.metric.verdict == "better"
    assert better.metric.low <= better.metric.difference <= better.metric.high
    assert "new becomes champion over old: better in " in better.why
    worse = decide(make(-0.1), metric)
    assert not worse.accepted
    assert worse.metric.verdict == "worse"
    assert "new does not replace old: worse in " in worse.why


@pytest.mark.parametrize("seed", range(5))
def test_identical_models_are_never_accepted(seed: int) -> None:
    def same(values: dict) -> dict:
        return values | {"new": values["old"]}

    scores = Made(
        nats_N=same(nats(0).nats_N),
        judged_2N=same(judged(0).judged_2N),
        words_2N=same(words(0).words_2N),
        entropies_N=same(entropies(0, side=1).entropies_N),
        features_NF=same(features(0).features_NF),
    )
    for metric in (
        NATS,
        *(kind(**TEXTS) for kind in (GenerativePerplexity, WordShare, EntropyGap, MauveGain)),
    ):
        decision = decide(scores, metric, seed=seed)
        assert not decision.accepted
        interval = decision.metric
        assert (interval.low, interval.difference, interval.high) == (0, 0, 0)
        assert interval.verdict == "undecided"


def test_chance_alone_is_seldom_accepted() -> None:
    accepted = 0
    for seed in range(200):
        rows_N = noise(seed)
        scores = Made(nats_N={"old": rows_N, "new": rows_N + noise(1000 + seed)})
        accepted += decide(scores, NATS, seed=seed).accepted
    assert accepted <= 14  # 2.5 % of 200 are 5; more than 14 come one time in a thousand


def test_the_perplexity_is_that_of_all_tokens() -> None:
    scores = judged(0.1)
    nats_N, tokens_N = scores.judged_2N["new"]
    found = decide(scores, GenerativePerplexity(**TEXTS)).metric
    assert found.candidate == pytest.approx(math.exp(nats_N.sum() / tokens_N.sum()))


def test_entropy_is_measured_against_real_text_not_as_such() -> None:
    over = Made(
        entropies_N={
            "real": 4 + 0 * noise(1),
            "old": 3.9 + 0.01 * noise(2),
            "new": 4.5 + 0 * noise(3),
        }
    )
    assert decide(over, EntropyGap(**TEXTS)).metric.verdict == "worse"


# --- MAUVE ---------------------------------------------------------------------------------------


def test_mauve_resamples_both_models_alike(
    asked: list[tuple[np.ndarray, np.ndarray, int]],
) -> None:
    """Rows are their own features here, so what k-means gets shows which were taken."""
    scores = Made(
        features_NF={
            "old": np.arange(6.0)[:, None],
            "new": 100 + np.arange(6.0)[:, None],
            "real": 1000 + np.arange(4.0)[:, None],
        }
    )
    decide(scores, MauveGain(**TEXTS, resamples=20), seed=9)
    assert len(asked) == 2 * (1 + 20)
    new, old = asked[:21], asked[21:]
    for (p_NF, q_MF, seed), (other_NF, same_MF, same_seed) in zip(new, old, strict=True):
        np.testing.assert_array_equal(p_NF - 100, other_NF)
        np.testing.assert_array_equal(q_MF, same_MF)
        assert seed == same_seed
        assert set(q_MF.ravel()) <= set(range(1000, 1004))
    assert new[0][0].ravel().tolist() == list(range(100, 106))
    assert len({seed for *_, seed in new}) == 21
    assert len({tuple(p_NF.ravel()) for p_NF, *_ in new}) > 15
    assert len({tuple(q_MF.ravel()) for _, q_MF, _ in new}) > 15


def test_mauve_of_texts_of_another_length_is_not_measurable() -> None:
    scores = features(0)
    scores.tokens_N = {"new": np.full(N, 60)}
    assert decide(scores, MauveGain(**TEXTS, resamples=20)).metric.verdict == "not measurable"
    scores.tokens_N = {"new": np.full(N, 63.5)}
    assert decide(scores, MauveGain(**TEXTS, resamples=20)).metric.verdict == "undecided"


# --- guards --------------------------------------------------------------------------------------


def test_a_guard_that_is_worse_vetoes() -> None:
    scores = replace(nats(0.1), entropies_N=entropies(-0.1, side=1).entropies_N)
    decision = decide(scores, NATS, EntropyGap(**TEXTS))
    assert decision.metric.verdict == "better"
    assert not decision.accepted
    assert decision.why.startswith("new does not replace old: worse in entropy of masked 8: 1.1 ")
    assert "at 95%" in decision.why


def test_a_guard_that_cannot_tell_lets_pass() -> None:
    scores = replace(nats(0.1), entropies_N=entropies(0.0, side=1).entropies_N)
    decision = decide(scores, NATS, EntropyGap(**TEXTS))
    assert decision.guards[0].verdict == "undecided"
    assert decision.accepted


def test_what_cannot_be_measured_is_not_let_pass() -> None:
    mute = {"old": (np.ones(N), np.ones(N)), "new": (np.zeros(N), np.zeros(N))}
    scores = replace(nats(0.1), words_2N=mute)
    decision = decide(scores, NATS, WordShare(**TEXTS))
    assert not decision.accepted
    assert "not measurable in words of masked 8" in decision.why
    assert not decide(scores, WordShare(**TEXTS)).accepted


def test_rows_that_cannot_be_paired() -> None:
    scores = Made(nats_N={"new": noise(1, 5), "old": noise(2, 6)})
    with pytest.raises(ValueError, match="6 rows cannot be paired with 5"):
        decide(scores, NATS)


def test_an_exact_likelihood_is_compared_on_the_rows_that_the_view_was_taken_of() -> None:
    scores: Any = Made(nats_N={"ar": np.array([1.0, 2.0, 3.0, 50.0])})
    found_R = Nats(view="unmasking").figures(scores, "ar", Resamples(0, 20))
    assert found_R[0] == 2.0
    assert found_R.max() <= 3.0


def test_a_gate_asks_whether_the_champion_can_be_measured_too() -> None:
    asked = []

    def metric(name: str) -> Any:
        return SimpleNamespace(require=lambda survey, model: asked.append((name, model)))

    wanted = SimpleNamespace(model="new", metric=metric("metric"), guards=(metric("guard"),))
    survey: Any = SimpleNamespace(config=SimpleNamespace(gate=wanted), kinds={"new": MDLM})
    promotion.require(survey)
    assert asked == [("metric", "new"), ("guard", "new")]
    survey.kinds["champion"] = AR
    promotion.require(survey)
    assert asked[2:] == [
        (name, model) for name in ("metric", "guard") for model in ("new", "champion")
    ]


# --- what is made of it --------------------------------------------------------------------------


def test_a_decision_as_rows() -> None:
    mute = {"old": (np.ones(N), np.ones(N)), "new": (np.zeros(N), np.zeros(N))}
    decision = decide(replace(nats(0.1), words_2N=mute), NATS, WordShare(**TEXTS))
    first, second = decision.rows()
    assert first == {
        "role": "metric",
        "metric": "nats per token, endpoint_bound",
        "candidate": decision.metric.candidate,
        "other": decision.metric.other,
        "difference": decision.metric.difference,
        "low": decision.metric.low,
        "high": decision.metric.high,
        "verdict": "better",
    }
    assert (second["role"], second["metric"]) == ("guard", "words of masked 8")


def test_a_confidence_of_less_than_all_is_not_called_100_percent() -> None:
    config = GateConfig(model="new", metric=NATS, confidence=0.995)
    decision = gate.compare(nats(0.1), config, candidate="new", other="old", seed=0)
    assert decision.why.endswith(" at 99.5%")
    assert pages._gate(decision).note.endswith("intervals at 99.5%.")


def test_the_same_seed_decides_the_same() -> None:
    assert decide(nats(0.01), NATS, seed=4) == decide(nats(0.01), NATS, seed=4)
    assert decide(nats(0.01), NATS, seed=4) != decide(nats(0.01), NATS, seed=5)


@pytest.mark.parametrize("wrong", [{"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 5}])
def test_a_config_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GateConfig(model="new", metric=NATS, **wrong)
    with pytest.raises(ValueError, match="resamples"):
        MauveGain(**TEXTS, resamples=1)
