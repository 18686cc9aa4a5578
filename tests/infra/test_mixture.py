"""Which source a microbatch comes from: by weight, whoever reads it, and from wherever."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import DataError
from infra.mixture import Change, Mixture, MixtureConfig, Schedule, read, read_manifests
from infra.shards import ShardWriter, VocabularyRecord
from infra.stream import StreamConfig, pieces
from tests.infra.common import alone

L, LANES, R = 4, 4, 3
STREAM = StreamConfig(seed=3, num_lanes=LANES, rows_per_microbatch=R, window_groups=2)
SIZES = {"a": 120, "b": 61, "c": 30}
WEIGHTS = {"a": 3.0, "b": 1.0}
CHANGES = (Change(step=31, weights={"c": 1.0}), Change(step=61, weights={"a": 1.0, "c": 1.0}))


def shards(to: Path, first: int, rows: int, length: int = L, vocabulary: str = "") -> str:
    """Rows that begin with consecutive ids."""
    record = VocabularyRecord(kind="char", sha256=vocabulary, size=2000)
    about = {"vocabulary": record, "length": length, "source": "", "split_rule": "", "blocks": ""}
    with ShardWriter(str(to), **about) as out:
        ids_NL = first + np.arange(rows)[:, None] + np.zeros(length, np.int64)
        out.write("train", ids_NL)
    return out.folder.url


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> MixtureConfig:
    """Three sources, whose rows begin with ids from 0, 500 and 1,000 on."""
    root = tmp_path_factory.mktemp("sources")
    firsts = zip(SIZES.items(), (0, 500, 1000), strict=True)
    sources = {name: shards(root / name, first, rows) for (name, rows), first in firsts}
    return MixtureConfig(sources=sources, weights=WEIGHTS, changes=CHANGES)


@pytest.fixture(scope="module")
def mixture(config: MixtureConfig) -> Mixture:
    return planned(config)


def planned(config: MixtureConfig) -> Mixture:
    return Mixture.of(config, read_manifests(config), "train", STREAM)


def imagined(weights: list[float], seed: int) -> Schedule:
    names = [f"s{nth}" for nth in range(len(weights))]
    config = MixtureConfig(
        sources=dict.fromkeys(names, ""), weights=dict(zip(names, weights, strict=True))
    )
    return Schedule(config=config, seed=seed)


def taken(order: Mixture, lanes: tuple[int, ...], start: int, steps: int) -> np.ndarray:
    """The first ids of the rows, ``[steps, lanes, R]``."""
    batches = islice(read(order, lanes, start), steps)
    return np.array([[batch[lane][:, 0] for lane in lanes] for batch in batches])


weights = st.lists(st.floats(0, 100), min_size=1, max_size=4).filter(lambda w: sum(w) > 1e-3)


@given(weights, st.integers(0, 2**64 - 1), st.integers(0, 99), st.integers(1, 3000))
def test_every_run_of_steps_has_its_shares(
    weights: list[float], seed: int, lane: int, steps: int
) -> None:
    mixture, shares = imagined(weights, seed), np.array(weights) / sum(weights)
    start = seed % 100_000
    counted = np.array(mixture.before(lane, start + steps)) - mixture.before(lane, start)
    assert counted.sum() == steps
    # The discrepancy of the golden ratio's multiples is below 2 + log2(n) / 2 for each end.
    assert (np.abs(counted - shares * steps) <= 4 + np.log2(steps)).all()
    assert (counted[shares == 0] == 0).all()


@given(weights, st.integers(0, 2**64 - 1), st.integers(0, 200))
def test_counts_are_those_of_the_steps_one_by_one(
    weights: list[float], seed: int, steps: int
) -> None:
    mixture = imagined(weights, seed)
    one_by_one = [mixture.source(7, step) for step in range(steps)]
    assert mixture.before(7, steps) == [one_by_one.count(nth) for nth in range(len(weights))]


def test_steps_are_counted_in_blocks(mixture: Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mixture.before(1, 100)
    monkeypatch.setattr("infra.mixture.AT_ONCE", 7)
    assert mixture.before(1, 100) == whole


def test_weights_hold_from_their_step_on(mixture: Mixture) -> None:
    sources = [[mixture.source(lane, step) for step in range(200)] for lane in range(LANES)]
    for row in sources:
        assert set(row[:30]) == {0, 1}
        assert set(row[30:60]) == {2}
        assert set(row[60:]) == {0, 2}
    assert len(set(map(tuple, sources))) == LANES  # every lane has an order of its own


def test_a_source_is_read_as_if_it_were_alone(mixture: Mixture) -> None:
    steps, lanes = 90, tuple(range(LANES))
    by_itself = [taken(alone(plan), lanes, 0, steps) for plan in mixture.plans]
    mixed, seen = taken(mixture, lanes, 0, steps), np.zeros((3, LANES), int)
    for step in range(steps):
        for lane in lanes:
            nth = mixture.source(lane, step)
            expected = by_itself[nth][seen[nth, lane], lane]
            np.testing.assert_array_equal(mixed[step, lane], expected)
            seen[nth, lane] += 1
    assert (seen > 0).all()


@pytest.mark.parametrize("start", [1, 17, 30, 31, 75])
def test_resuming_is_seeking(mixture: Mixture, start: int) -> None:
    lanes = tuple(range(LANES))
    whole = taken(mixture, lanes, 0, start + 20)
    np.testing.assert_array_equal(taken(mixture, lanes, start, 20), whole[start:])


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_share_the_same_rows(mixture: Mixture, workers: int) -> None:
    whole = taken(mixture, tuple(range(LANES)), 0, 70)
    for rank in range(workers):
        lanes = STREAM.lanes(rank, workers)
        np.testing.assert_array_equal(taken(mixture, lanes, 0, 70), whole[:, lanes])


def test_the_order_is_pinned(mixture: Mixture) -> None:
    """Resumed runs depend on this order."""
    assert [mixture.source(0, step) for step in range(12)] == [0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    assert mixture.before(2, 1000) == [492, 8, 500]


def test_one_source_is_the_plan_itself(config: MixtureConfig) -> None:
    mixture, lanes = planned(MixtureConfig.alone(config.sources["a"])), tuple(range(LANES))
    planned_N: dict[int, list[int]] = {lane: [] for lane in lanes}
    for lane, rows_NL in pieces(mixture.plans[0], lanes, [0] * LANES):
        planned_N[lane] += rows_NL[:, 0].tolist()
        if min(map(len, planned_N.values())) >= 40 * R:
            break
    for lane, found_NR in enumerate(taken(mixture, lanes, 0, 40).swapaxes(0, 1)):
        assert found_NR.ravel().tolist() == planned_N[lane][: 40 * R]


def test_shares_are_those_of_the_step(config: MixtureConfig) -> None:
    assert config.shares(1) == config.shares(30) == {"a": 0.75, "b": 0.25, "c": 0}
    assert config.shares(31) == {"a": 0, "b": 0, "c": 1}
    assert config.shares(10**6) == {"a": 0.5, "b": 0, "c": 0.5}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sources": {}}, "at least one"),
        *(({"sources": {name: "x", "b": "y"}}, "letters, digits") for name in ("", "a:b", "c++")),
        ({"weights": {"d": 1.0}}, "weights name d"),
        ({"weights": {"a": -1.0}}, "at least 0"),
        ({"weights": {"a": 0.0}}, "at least 0"),
        ({"weights": {"a": float("inf")}}, "at least 0"),
        ({"weights": {"a": 1e308, "b": 1e308}}, "at least 0"),
        ({"changes": (Change(step=1, weights=WEIGHTS),)}, "ascending"),
        ({"changes": CHANGES[::-1]}, "ascending"),
        ({"changes": (Change(step=9, weights={"x": 1.0}),)}, "weights name x"),
    ],
)
def test_settings_that_make_no_mixture(
    config: MixtureConfig, given: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        replace(config, **given)


@pytest.mark.parametrize(
    ("given", "word"), [({"length": 5}, "length"), ({"vocabulary": "x"}, "vocabulary")]
)
def test_sources_must_agree(
    config: MixtureConfig, tmp_path: Path, given: dict[str, object], word: str
) -> None:
    other = shards(tmp_path / "other", 0, 50, **given)
    wrong = replace(config, sources={**config.sources, "d": other})
    with pytest.raises(DataError, match=f"{other}: its {word} is not that of a"):
        planned(wrong)
