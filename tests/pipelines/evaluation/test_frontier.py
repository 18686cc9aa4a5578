"""The frontier: exact on curves and laws that are known, and whole on tiny models.

Shapes: N texts, L positions, T temperatures, R resamples, V tokens.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dsl import paths
from dsl.truncation import Nucleus
from infra.errors import ConfigError
from pipelines.evaluation import grid
from pipelines.evaluation.cells import PathConfig, cells
from pipelines.evaluation.curves import crossing
from pipelines.evaluation.diversity import ngram_entropies, telling, text_entropies
from pipelines.evaluation.gate import Resamples, means
from pipelines.evaluation.grid import FrontierConfig
from pipelines.evaluation.ngram import NGram
from pipelines.evaluation.questions.frontier import Headline
from pipelines.evaluation.questions.texts import SamplesConfig
from tests.pipelines.evaluation.conftest import Refused, Run

R = 20


def same(values_T: Any) -> np.ndarray:
    """The same values in the texts as they are and in every resample, ``[T, 1 + R]``."""
    return np.repeat(np.atleast_1d(np.asarray(values_T, float))[:, None], 1 + R, 1)


def at(diversity_T: Any, bits_T: Any, target: float) -> float:
    """The bits at a diversity; NaN where it is not reached."""
    found = crossing(same(diversity_T), same(target)[0], 0.95)
    values_R = found.of(same(bits_T))
    assert (values_R == values_R[0]).all() or np.isnan(values_R).all()
    return float(values_R[0])


# --- the diversity of real text on a curve -------------------------------------------------------


@given(
    diversity=st.lists(st.floats(0, 5), min_size=2, max_size=6, unique=True).map(sorted),
    slope=st.floats(-3, 3),
    share=st.floats(0, 1),
    falling=st.booleans(),
)
def test_on_a_straight_line_the_headline_is_exact(
    diversity: list[float], slope: float, share: float, falling: bool
) -> None:
    target = diversity[0] + share * (diversity[-1] - diversity[0])
    assume(diversity[0] <= target <= diversity[-1])
    diversity_T = np.array(diversity[:: -1 if falling else 1])
    bits_T = 2 + slope * diversity_T
    assert at(diversity_T, bits_T, target) == pytest.approx(2 + slope * target, abs=1e-9)
    # A judge on another scale says the same on its own.
    assert at(diversity_T, 5 * bits_T - 1, target) == pytest.approx(
        9 + 5 * slope * target, abs=1e-9
    )


def test_between_two_temperatures_it_is_the_line_through_both() -> None:
    assert at([1.0, 2.0, 4.0], [7.0, 3.0, 5.0], 2.5) == pytest.approx(3.5)
    assert at([1.0, 2.0, 4.0], [7.0, 3.0, 5.0], 1.25) == pytest.approx(6.0)


@pytest.mark.parametrize("number", range(3))
def test_a_temperature_with_the_very_diversity_is_taken_as_it_is(number: int) -> None:
    diversity, bits = [1.0, 2.0, 4.0], [7.0, 3.0, 5.0]
    assert at(diversity, bits, diversity[number]) == bits[number]
    assert at(diversity[number], bits[number], diversity[number]) == bits[number]


@pytest.mark.parametrize(("target", "side"), [(0.5, "more"), (4.5, "less")])
@pytest.mark.parametrize("diversity", [[1.0, 2.0, 4.0], [2.0]])
def test_what_does_not_reach_it_says_on_which_side_it_stays(
    diversity: list[float], target: float, side: str
) -> None:
    found = crossing(same(diversity), same(target)[0], 0.95)
    assert not found.reached
    assert found.lost == R
    assert side in found.said
    assert math.isnan(at(diversity, diversity, target))


def test_of_several_crossings_the_nearest_counts_and_of_equal_ones_the_coolest() -> None:
    assert at([0.0, 3.0, 1.5, 2.5], [0.0, 30.0, 1.0, 2.0], 2.0) == pytest.approx(1.5)
    assert at([1.0, 3.0, 1.0], [10.0, 20.0, 30.0], 2.0) == pytest.approx(15.0)


def test_equal_diversities_at_the_target_give_the_cooler_one() -> None:
    assert at([2.0, 2.0], [5.0, 6.0], 2.0) == 5.0


def test_one_temperature_reaches_what_it_cannot_be_told_from() -> None:
    noise_R = np.random.default_rng(0).normal(size=1 + 500)
    for gap, reached in ((0.5, True), (5.0, False)):
        found = crossing((gap + noise_R)[None], np.zeros(501), 0.95)
        assert found.reached is reached
        assert found.lost == (0 if reached else 500)


def test_lost_resamples_are_counted() -> None:
    diversity_TR = np.array([[1.0, 1.0, 1.8, 1.0], [2.0, 2.0, 2.0, 1.4]])
    found = crossing(diversity_TR, np.full(4, 1.5), 0.95)
    assert found.reached
    assert found.lost == 2
    bits_R = found.of(np.array([[1.0] * 4, [3.0] * 4]))
    assert bits_R[:2].tolist() == [2.0, 2.0]
    assert np.isnan(bits_R[2:]).all()


# --- how diverse texts are -----------------------------------------------------------------------

P_VV = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])


def markov(rows: int, length: int, seed: int) -> np.ndarray:
    """Texts of a chain that begins with each token alike."""
    generator = np.random.default_rng(seed)
    texts_NL = np.empty((rows, length), np.int64)
    texts_NL[:, 0] = generator.integers(3, size=rows)
    for place in range(1, length):
        cdf_NV = P_VV[texts_NL[:, place - 1]].cumsum(1)
        texts_NL[:, place] = (generator.random((rows, 1)) > cdf_NV).sum(1)
    return texts_NL


def markov_entropy(length: int) -> float:
    """Of a text of the chain, in nats per token."""
    p_V, total = np.full(3, 1 / 3), math.log(3)
    for _ in range(length - 1):
        total -= p_V @ (P_VV * np.log(P_VV)).sum(1)
        p_V = p_V @ P_VV
    return total / length


def test_ngrams_bound_the_entropy_of_a_known_law_ever_closer() -> None:
    truth, before = markov_entropy(40), math.inf
    for rows in (20, 80, 320, 1280):
        nats_N = np.concatenate([ngram_entropies(markov(rows, 40, s), 3) for s in range(6)])
        error = nats_N.std() / math.sqrt(len(nats_N))
        assert truth - 4 * error < nats_N.mean() < before
        before = nats_N.mean()
    assert before < 1.02 * truth


def test_no_text_is_read_by_a_model_that_has_seen_it() -> None:
    tokens_NL = markov(23, 12, 0)
    found_N = ngram_entropies(tokens_NL, 3)
    for number in (0, 7, 22):
        others = np.arange(23) % 5 != number % 5
        expected = NGram(tokens_NL[others], 3, 6).nats(tokens_NL[number : number + 1]).mean()
        assert found_N[number] == pytest.approx(expected)


def test_texts_that_are_all_alike_are_diverse_by_themselves_alone() -> None:
    """Which is why a small vocabulary takes the entropy of n-grams."""
    tokens_NL = markov(40, 30, 0)
    alike_NL = np.repeat(tokens_NL[:1], 40, 0)
    assert ngram_entropies(alike_NL, 3).mean() < 0.2 * ngram_entropies(tokens_NL, 3).mean()
    assert text_entropies(alike_NL, 3).mean() == pytest.approx(text_entropies(tokens_NL[:1], 3)[0])


@pytest.mark.parametrize(
    ("vocabulary", "length", "kind"),
    [(27, 64, "ngram"), (511, 64, "ngram"), (512, 64, "entropy"), (50257, 1024, "entropy")],
)
def test_the_diversity_goes_by_tokens_for_each_position(
    vocabulary: int, length: int, kind: str
) -> None:
    assert telling(vocabulary, length) == kind


# --- the interval --------------------------------------------------------------------------------


def test_the_interval_covers_the_headline_of_a_known_law_as_often_as_it_says() -> None:
    """Two temperatures whose texts have mean diversity 1 and 2, bits 2 and 4 on average, and real
    text of mean diversity 1.4: the headline is 2.8."""
    covered, runs, rows = 0, 300, 100
    for seed in range(runs):
        generator, draws = np.random.default_rng(seed), Resamples(seed, 200)
        # Diverse texts are hard for the judge: both figures of a text go together.
        hard_TN = generator.normal(scale=0.5, size=(2, rows))
        taken = draws.rows(rows)
        diversity_TR = np.stack([means(m + n, taken) for m, n in zip((1, 2), hard_TN, strict=True)])
        bits_TR = np.stack([means(m + 2 * n, taken) for m, n in zip((2, 4), hard_TN, strict=True)])
        real_R = means(generator.normal(1.4, 0.5, size=rows), taken)
        values_R = crossing(diversity_TR, real_R, 0.9).of(bits_TR)[1:]
        low, high = np.quantile(values_R, (0.05, 0.95))
        covered += low <= 2.8 <= high
    # Four standard errors of a share of 0.9, and what percentiles of 100 rows fall short by.
    assert 0.9 - 0.07 - 0.02 < covered / runs < 0.9 + 0.07


# --- which texts ---------------------------------------------------------------------------------

PATHS = {
    "m": PathConfig(path=paths.Masked(), budgets=(2, 4)),
    "n": PathConfig(path=paths.Masked(), budgets=(4,), nucleus=Nucleus(p=0.9)),
}
WALKED = cells(["a", "b"], PATHS, 8)


def asked(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(frontier=FrontierConfig(**given), samples=SamplesConfig(rows=30))


def test_a_grid_does_not_draw_again_what_is_there() -> None:
    found = grid.grid(asked(temperatures=(1.0, 0.5), budgets=(4,), paths=("m", "n")), WALKED)
    names = [[cell.name for cell in of_curve] for of_curve in found.values()]
    assert names[:2] == [["a-m-4-t0.5", "a-m-4"], ["a-n-4-t0.5-p0.9", "a-n-4"]]
    assert len(names) == 4


def test_the_order_of_temperatures_is_nothing() -> None:
    one, other = (asked(temperatures=given) for given in ((0.5, 1.0, 0.7), (1.0, 0.7, 0.5)))
    assert grid.grid(one, WALKED) == grid.grid(other, WALKED)


def test_every_nucleus_has_a_curve() -> None:
    given = asked(temperatures=(0.5, 1.0), nuclei=(Nucleus(p=0.9), Nucleus()), paths=("n",))
    found = grid.grid(given, WALKED)
    names = [[cell.name for cell in of_curve] for of_curve in found.values()]
    assert names[:2] == [["a-n-4-t0.5-p0.9", "a-n-4"], ["a-n-4-t0.5-p1.0", "a-n-4-t1.0-p1.0"]]


def test_adversaries_that_differ_in_their_temperature_are_a_curve() -> None:
    names = ["real", "ngram", "replaced-5", "ngram-0.8", "warm-1.5", "ngram-1.2"]
    found = {curve.name: curve for curve in grid._beside(names)}
    assert list(found) == ["real", "ngram", "replaced-5", "warm"]
    assert found["ngram"].sources == ("ngram-0.8", "ngram", "ngram-1.2")
    assert found["ngram"].temperatures == (0.8, 1.0, 1.2)
    assert (found["warm"].sources, found["warm"].temperatures) == (("warm-1.5",), (1.5,))
    assert found["replaced-5"].temperatures == ()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperatures": ()}, "at least one"),
        ({"temperatures": (0.5, 1.0, 0.5)}, "temperatures holds 0.5 twice"),
        ({"temperatures": (0.0,)}, "positive"),
        ({"nuclei": (Nucleus(p=0.5), Nucleus(p=0.5, convention="drop"))}, "nuclei holds 0.5 twice"),
        ({"confidence": 1.0}, "confidence"),
        ({"resamples": 3}, "resamples"),
    ],
)
def test_a_config_out_of_range(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FrontierConfig(**given)


JUDGED = ["judge={kind: ngram}", "paths={m: {path: masked, budgets: [2]}}", "samples.rows=20"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["frontier={}", "samples.rows=20"], ["frontier", "judge.kind=ngram"]),
        ([*JUDGED, "frontier.paths=[mm]"], ["frontier.paths", "Did you mean m"]),
        ([*JUDGED, "frontier.budgets=[3]"], ["frontier.budgets", "3 calls", "2"]),
        ([*JUDGED, "frontier.rows=19"], ["frontier.rows", "at least 20"]),
        ([*JUDGED, "frontier.rows=21"], ["frontier.rows", "21", "samples.rows is 20"]),
        ([*JUDGED, "frontier.temperatures=[]"], ["frontier", "at least one"]),
        ([*JUDGED, "frontier={}", "judges.judge={kind: ngram}"], ["judges", "name"]),
    ],
)
def test_a_bad_setting_is_one_message(refused: Refused, given: list[str], words: list[str]) -> None:
    refused(["models={a: WORLD/dsl}", *given], 2, words)


# --- through the command line --------------------------------------------------------------------


def test_from_the_command_line_to_the_page(run: Run, world: Path, tmp_path: Path) -> None:
    argv = [
        f"models={{mdlm: {world / 'mdlm'}, dsl: {world / 'dsl'}}}",
        "samples={rows: 20, traced: 1}",
        "batch=20",
        "adversaries=true",
        "judge={kind: ngram}",
        "judges.short={kind: ngram, order: 1}",
        "paths={masked: {path: masked, budgets: [2, 4]}}",
        "frontier={temperatures: [2.0, 0.02, 1.0], budgets: [4], resamples: 40}",
    ]
    code, planned, err = run(*argv, "--dry-run")
    assert code == 0, err
    assert planned["texts_per_model"] == 20 * (2 + 2)
    code, made, err = run(*argv)
    assert code == 0, err
    folder = tmp_path / "judged"
    tables = json.loads((folder / "report/evaluation.json").read_text())

    # Texts of the grid are drawn, and stand in no table of texts.
    drawn = {path.name for path in (folder / "samples").iterdir()}
    assert {"dsl-masked-4-t0.02", "dsl-masked-4-t2.0", "dsl-masked-4"} <= drawn
    assert "dsl-masked-4-t1.0" not in drawn
    assert len([row for row in tables["samples"] if "path" in row]) == 4
    assert not (folder / "parts/read/dsl-masked-4-t0.02").exists()

    # What the frontier says is what can be counted in the texts.
    points = {(r["model"], r.get("temperature")): r for r in tables["frontier"]}

    def figures(source: str) -> tuple[float, float]:
        tokens = pq.read_table(folder / f"samples/{source}")["tokens"].to_pylist()
        judged = pq.read_table(folder / f"parts/judged/{source}").to_pydict()
        bits = sum(judged["nats_N"]) / math.log(2) / sum(judged["bytes_N"])
        return ngram_entropies(np.array(tokens), 28).mean(), bits

    sources = {0.02: "dsl-masked-4-t0.02", 1.0: "dsl-masked-4", 2.0: "dsl-masked-4-t2.0"}
    expected = {t: figures(source) for t, source in sources.items()}
    for temperature, pair in expected.items():
        row = points["dsl", temperature]
        assert (row["diversity"], row["frontier_judge"]) == pytest.approx(pair)
    diversity, bits = zip(*(expected[t] for t in (0.02, 1.0, 2.0)), strict=True)
    real, real_bits = figures("real")
    assert diversity[0] < real < diversity[1]

    # The headline is on the line between two of these points.
    heads = {row["model"]: row for row in tables["headline"]}
    head = heads["dsl"]
    assert head["headline_judge"] == pytest.approx(np.interp(real, diversity, bits))
    assert head["headline_judge_low"] <= head["headline_judge"] <= head["headline_judge_high"]
    assert 0.02 < head["at"] < 1
    assert heads["real"]["headline_judge"] == pytest.approx(real_bits)
    assert "less" in heads["repeated"]["reached"]
    assert "more" in heads["shuffled"]["reached"]
    assert "headline_judge" not in heads["shuffled"]
    logged = made["metrics"]
    assert logged["dsl/masked/4/headline_short"] == pytest.approx(head["headline_short"])
    assert logged["dsl/masked/4/0.02/diversity"] == pytest.approx(diversity[0])

    # It leads the page, and its plot stands before what is folded.
    page = (folder / "report/report.html").read_text()
    assert 'class="verdict">Bits per byte by judge at the diversity of real text: ' in page
    ahead = page[: page.index("<details>")]
    (shown,) = re.findall(r'<img alt="([^"]*)"', ahead)
    assert "bits per byte by judge" in shown
    files = {file.name for file in (folder / "report").iterdir()}
    assert {"frontier_judge.png", "frontier_short.png"} <= files
    fooled = {row["model"]: row["above"] for row in tables["fooled"]}
    assert "perplexity" in fooled["repeated"]
    assert "diversity of real text" not in fooled["repeated"]


# --- the gate ------------------------------------------------------------------------------------


class Made:
    """What a gate reads of an evaluation: ten texts at each of two temperatures along one path, of
    models "new" and "old", and of "real" and "unigram"."""

    def __init__(self, better_by: float) -> None:
        judge = SimpleNamespace(judged=lambda config: {"judge": "judged"})
        frontier = FrontierConfig(temperatures=(0.5, 0.6), resamples=50)
        self.walked = cells(["new", "old"], {"m": PathConfig(path=paths.Masked(), budgets=(4,))}, 8)
        self.config = SimpleNamespace(
            frontier=frontier,
            samples=SamplesConfig(rows=40),
            questions=(judge,),
            beside=("unigram", "real"),
        )
        noise = np.random.default_rng(0)
        self.found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        worse = {"new-m-4": 1.0 - better_by, "old-m-4": 1.0}
        centres = {"real": (1.4, 1.0), "unigram": (3.0, 9.0)}
        for name, more in worse.items():
            centres |= {f"{name}-t0.5": (1.0, 2.0 + more), f"{name}-t0.6": (2.0, 3.0 + more)}
        shared_N = noise.normal(scale=0.1, size=40)
        for name, (diversity, bits) in centres.items():
            self.found[name] = diversity + shared_N, bits + noise.normal(scale=0.05, size=40)

    def source(self, model: str, path: str, budget: int) -> str:
        return "unigram" if model == "unigram" else f"{model}-{path}-{budget}"

    def columns(self, group: str, *names: str) -> dict[str, np.ndarray]:
        folder, _, source = group.rpartition("/")
        diversity_N, bits_N = self.found[source]
        if folder != "judged":
            return {"diversity": diversity_N}
        return {"nats_N": bits_N * 10 * math.log(2), "bytes_N": np.full(40, 10)}


def difference(metric: Headline, made: Any, other: str) -> np.ndarray:
    draws = Resamples(0, 50)
    ours_R, theirs_R = (metric.figures(made, model, draws) for model in ("new", other))
    return metric.sign * (ours_R - theirs_R)


def test_the_gate_compares_headlines() -> None:
    metric = Headline(path="m", budget=4)
    better, worse = (difference(metric, Made(by), "old") for by in (0.5, -0.5))
    assert better[0] == pytest.approx(0.5, abs=0.05)
    assert (better > 0).all()
    assert (worse < 0).all()
    assert (difference(metric, Made(0), "unigram") > 3).all()


@pytest.mark.parametrize(
    ("metric", "given", "words"),
    [
        ({"judge": "other"}, {}, "Name one of: judge"),
        ({}, {"nuclei": (Nucleus(p=0.5), Nucleus())}, "2 curves"),
        ({}, {"budgets": (5,)}, "0 curves"),
    ],
)
def test_a_gate_without_its_headline_is_refused(
    metric: dict[str, Any], given: dict[str, Any], words: str
) -> None:
    made: Any = Made(0)
    wanted = Headline(path="m", budget=4, **metric)
    Headline(path="m", budget=4).require(made, "new")
    made.config.frontier = replace(made.config.frontier, **given)
    with pytest.raises(ConfigError, match=words):
        wanted.require(made, "new")
    made.config.frontier = None
    with pytest.raises(ConfigError, match="Give frontier"):
        wanted.require(made, "new")
