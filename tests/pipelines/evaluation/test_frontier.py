"""The frontier: which texts it draws, the whole of it on tiny models, and what a gate makes of it.

Shapes: N texts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dsl import paths
from dsl.truncation import Nucleus
from infra.errors import ConfigError
from pipelines.evaluation import grid
from pipelines.evaluation.cells import PathConfig, cells
from pipelines.evaluation.diversity import ngram_entropies
from pipelines.evaluation.gate import Resamples, means
from pipelines.evaluation.grid import FrontierConfig
from pipelines.evaluation.questions.frontier import Headline, _ahead, _below
from pipelines.evaluation.questions.texts import SamplesConfig
from tests.pipelines.evaluation.conftest import Refused, Run

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
        ({"temperatures": ()}, "at least two"),
        ({"temperatures": (1.0,)}, "at least two, since the diversity of real text lies between"),
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
        ([*JUDGED, "frontier.temperatures=[]"], ["frontier", "at least two"]),
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
    assert (head["reached"], heads["real"]["reached"]) == ("yes", "cannot be told apart")
    assert heads["real"]["headline_judge"] == pytest.approx(real_bits)
    assert "less" in heads["repeated"]["reached"]
    assert "more" in heads["shuffled"]["reached"]
    assert "headline_judge" not in heads["shuffled"]
    assert (heads["shuffled"]["below_judge"], heads["repeated"]["below_judge"]) == (1, 1)
    assert all("below_judge" not in heads[name] for name in ("dsl", "real"))
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


def measured(bits_R: Sequence[float] | np.ndarray, **labels: Any) -> grid.Measured:
    curve = grid.Curve("x", labels, ("x",))
    nothing: Any = None
    return grid.Measured(curve, nothing, {}, nothing, {"judge": np.array(bits_R)})


def test_an_adversary_must_beat_the_best_walk_of_some_model() -> None:
    """Four resamples behind the texts as they are: worse than all, between the models, above both,
    and without a headline."""
    none = math.nan
    walks = [
        measured([2, 2, 2, 2, 2], model="a", path="m"),
        measured([9, 9, 9, 9, 9], model="a", path="n"),
        measured([3, 3, 3, 3, 3], model="b", path="m"),
    ]
    adversary = measured([0, 4, 2.5, 1, none], model="nonsense")
    assert _below(adversary, walks) == {"below_judge": 0.5}
    assert _below(walks[0], walks) == {}
    # Where a model does not reach the diversity of real text, there is nothing to be below.
    seldom = measured([3, none, 3, 3, none], model="c", path="m")
    assert _below(adversary, [*walks, seldom]) == {"below_judge": 0.0}
    for bits in ([none] * 5, [none, 3, 3, 3, 3], [3, none, none, none, none]):
        lost = measured(bits, model="c", path="m")
        assert _below(adversary, [*walks, lost]) == {}
        assert _below(measured([none] * 5, model="nonsense"), [lost]) == {}


def test_a_walk_is_compared_with_the_best_of_the_first_model_in_as_many_calls() -> None:
    none = math.nan
    walks = [
        measured([3, 3, 5, none, 3], model="a", path="m", budget=8),
        measured([4, 4, 4, none, 4], model="a", path="n", budget=8),
        measured([1, 1, 1, 1, 1], model="a", path="n", budget=16),
    ]
    ours = measured([2, 1, 1, 1, 2], model="b", path="m", budget=8)
    row = _ahead(ours, [*walks, ours], confidence=0.2)
    assert row["ahead_judge"] == 1
    # 2, 3 and 1 bits, and once nothing to compare with, which may be anything.
    assert row["ahead_judge_low"] == np.quantile([2, 3, -math.inf, 1], 0.4)
    assert row["ahead_judge_high"] == np.quantile([2, 3, math.inf, 1], 0.6)
    assert _ahead(walks[0], [*walks, ours], confidence=0.2) == {}
    assert _ahead(measured([1] * 5, model="nonsense"), [*walks, ours], confidence=0.2) == {}
    nowhere = measured([none] * 5, model="b", path="n", budget=8)
    assert _ahead(nowhere, [*walks, nowhere], confidence=0.2) == {}


def test_an_interval_that_has_no_ends_is_called_unbounded() -> None:
    rival = measured([3, math.nan, math.nan, 3], model="a", path="m", budget=8)
    ours = measured([2, 1, 1, 2], model="b", path="m", budget=8)
    row = _ahead(ours, [rival, ours], confidence=0.95)
    assert (row["ahead_judge_low"], row["ahead_judge_interval"]) == (-math.inf, "unbounded")


def found_ahead(first: int, others: int, runs: int) -> int:
    """In how many simulated cases the best of some walks is ahead of so many walks of the first
    model, where all walks are of one law."""
    ahead = 0
    for seed in range(runs):
        noise, taken = np.random.default_rng(seed), Resamples(seed, 200).rows(50)
        walks = [
            measured(means(noise.normal(3, 1, 50), taken), model=model, path=str(number), budget=8)
            for number, model in enumerate("a" * first + "b" * others)
        ]
        best = min(walks[first:], key=lambda walk: walk.bits_R["judge"][0])
        ahead += _ahead(best, walks, 0.95)["ahead_judge_low"] > 0
    return ahead


def test_the_best_of_many_walks_is_ahead_by_chance_only_where_it_has_few_to_beat() -> None:
    """What the note of the table says."""
    assert found_ahead(4, 6, runs=300) < 5
    assert found_ahead(1, 6, runs=300) > 45


# --- the gate ------------------------------------------------------------------------------------


class Made:
    """What a gate reads of an evaluation: 40 texts at each of two temperatures along one path, of
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
