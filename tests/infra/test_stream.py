from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from infra import mixture, readahead, stream
from infra.errors import ConfigError, DataError
from infra.readahead import ray_batches
from infra.shards import Manifest, Shard, ShardWriter, VocabularyRecord
from infra.storage import Folder
from infra.stream import Plan, StreamConfig, holdout, read_window
from tests.infra.common import alone

L, ROWS = 4, 230
CONFIG = StreamConfig(seed=3, num_lanes=4, rows_per_microbatch=3, window_groups=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Shards in several files of several groups, the last ones short; row r begins with id r."""
    rows_NL = np.arange(ROWS)[:, None] + np.array([0, 1, 2, 3]) * 300
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infra.shards.ROWS_PER_FILE", 64)
        patch.setattr("infra.shards.ROWS_PER_GROUP", 7)
        with ShardWriter(
            str(tmp_path_factory.mktemp("shards")),
            vocabulary=VocabularyRecord(kind="char", sha256="", size=2000),
            length=L,
            source="a test",
            split_rule="",
            blocks="eos",
        ) as out:
            out.write("train", rows_NL)
            out.write("validation", rows_NL[:20])
    return out.folder


@pytest.fixture(scope="module")
def manifest(folder: Folder) -> Manifest:
    from infra.shards import read_manifest

    return read_manifest(folder)


@pytest.fixture(scope="module")
def plan(folder: Folder, manifest: Manifest) -> Plan:
    return Plan.of(folder, manifest, "train", CONFIG)


def read(plan: Plan, lanes: Sequence[int], start_step: int = 0) -> Iterator[dict[int, np.ndarray]]:
    return mixture.read(alone(plan), lanes, start_step)


def take(batches: Iterator[dict[int, np.ndarray]], steps: int) -> list[dict[int, np.ndarray]]:
    return list(islice(batches, steps))


def same(ours: list[dict[int, np.ndarray]], theirs: list[dict[int, np.ndarray]]) -> bool:
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(np.array_equal(a[lane], b[lane]) for lane in a)
        for a, b in zip(ours, theirs, strict=True)
    )


def imagined(groups: list[list[int]], config: StreamConfig) -> Plan:
    """A plan over files that are not there."""
    files = tuple(
        Shard(name=f"train/part-{nth}.parquet", rows=sum(rows), bytes=1, sha256="")
        for nth, rows in enumerate(groups)
    )
    manifest = Manifest(
        vocabulary=VocabularyRecord(kind="char", sha256="", size=1),
        length=1,
        splits={"train": files},
        source="",
        split_rule="",
        blocks="",
        commit="",
    )
    return Plan(
        folder=Folder.at("memory://nowhere"),
        manifest=manifest,
        split="train",
        config=config,
        file_G=np.repeat(np.arange(len(groups)), [len(rows) for rows in groups]),
        group_G=np.concatenate([np.arange(len(rows)) for rows in groups]),
        rows_G=np.concatenate([np.asarray(rows) for rows in groups]),
    )


layouts = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5)
seeds = st.integers(0, 2**64 - 1)


@given(layouts, seeds, st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
def test_the_windows_of_an_epoch_partition_its_rows(
    groups: list[list[int]], seed: int, lanes: int, window_groups: int, epoch: int
) -> None:
    config = StreamConfig(
        seed=seed, num_lanes=lanes, rows_per_microbatch=1, window_groups=window_groups
    )
    plan = imagined(groups, config)
    assume(plan.rows >= lanes)
    seen: list[tuple[str, int, int]] = []
    owned = dict.fromkeys(range(lanes), 0)
    for lane, window in plan.windows(range(lanes), [0] * lanes):
        if window.epoch > 2 * epoch + 3:  # a lane of few rows turns up to twice as fast
            break
        assert lane == window.index % lanes
        if window.epoch == epoch:
            rows = [
                (name, group, row)
                for name, group, start, stop in window.slices
                for row in range(start, stop)
            ]
            assert rows
            assert all(start < stop for *_, start, stop in window.slices)
            seen += rows
            owned[lane] += 1
    every = [
        (f"train/part-{file}.parquet", group, row)
        for file, rows in enumerate(groups)
        for group, count in enumerate(rows)
        for row in range(count)
    ]
    assert sorted(seen) == every
    assert len(set(owned.values())) == 1  # no lane turns faster than another


@given(layouts, seeds, st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**15))
def test_seek_is_skipping(
    groups: list[list[int]], seed: int, lanes: int, rows_per_microbatch: int, step: int
) -> None:
    config = StreamConfig(
        seed=seed, num_lanes=lanes, rows_per_microbatch=rows_per_microbatch, window_groups=2
    )
    plan = imagined(groups, config)
    assume(plan.rows >= lanes)
    for lane in range(lanes):
        windows = range(lane, plan.num_windows, lanes)
        sizes = [plan._edge(window + 1) - plan._edge(window) for window in windows]
        place = plan.seek(lane, step)
        nth = windows.index(place.window)
        assert 0 <= place.row < sizes[nth]
        walked = place.epoch * sum(sizes) + sum(sizes[:nth]) + place.row
        assert walked == step * rows_per_microbatch


def test_microbatches_are_the_rows_of_the_lane_in_order(plan: Plan) -> None:
    """Against the definition, read naively: all windows of each lane, one after the other."""
    steps, rows = 60, CONFIG.rows_per_microbatch
    naive: dict[int, list[np.ndarray]] = {lane: [] for lane in range(4)}
    for lane, window in islice(plan.windows(range(4), [0] * 4), 160):
        assert window.skip == 0
        naive[lane].append(read_window(plan.folder, plan.manifest, window)[0])
    for step, batch in enumerate(take(read(plan, range(4)), steps)):
        for lane in range(4):
            rows_NL = np.concatenate(naive[lane])[step * rows : (step + 1) * rows]
            np.testing.assert_array_equal(batch[lane], rows_NL)
            assert batch[lane].dtype == np.int64


def test_an_epoch_shows_every_row_once(plan: Plan) -> None:
    shown = [
        read_window(plan.folder, plan.manifest, window)[0][:, 0]
        for _, window in islice(plan.windows(range(4), [0] * 4), 3 * plan.num_windows)
        if window.epoch == 1
    ]
    order_N = np.concatenate(shown)
    assert sorted(order_N) == list(range(ROWS))
    assert np.abs(np.diff(order_N)).mean() > ROWS / 10  # and not in order


def test_every_epoch_puts_other_groups_together(plan: Plan) -> None:
    first = [window.slices for _, window in islice(plan.windows([0], [0]), 60) if window.index == 0]
    assert len(set(first)) == len(first) > 3


@pytest.mark.parametrize("step", [1, 7, 19, 20, 200])
def test_resuming_is_seeking(plan: Plan, step: int) -> None:
    whole = take(read(plan, range(4)), step + 25)
    assert same(take(read(plan, range(4), step), 25), whole[step:])


def test_resuming_reads_at_most_one_window_twice(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def counting(folder: Folder, manifest: Manifest, window: stream.Window, *more: Any) -> Any:
        asked.append((window.epoch, window.index))
        return read_window(folder, manifest, window, *more)

    monkeypatch.setattr(stream, "read_window", counting)
    take(read(plan, range(4)), 50)
    before = asked.copy()
    asked.clear()
    take(read(plan, range(4), 50), 1)
    assert len(set(asked) & set(before)) <= 4
    assert len(asked) <= 2 * 4


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_share_the_same_batches(plan: Plan, world_size: int) -> None:
    alone = take(read(plan, CONFIG.lanes(0, 1)), 40)
    parts = [take(read(plan, CONFIG.lanes(rank, world_size)), 40) for rank in range(world_size)]
    together = [
        {lane: rows for part in parts for lane, rows in part[step].items()} for step in range(40)
    ]
    assert same([dict(sorted(batch.items())) for batch in together], alone)


def test_lanes_must_share_out_evenly() -> None:
    assert [CONFIG.lanes(rank, 2) for rank in range(2)] == [(0, 2), (1, 3)]
    with pytest.raises(ConfigError, match="4 lanes cannot be shared out evenly to 3 workers"):
        CONFIG.lanes(0, 3)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"num_lanes": 0}, {"rows_per_microbatch": 0}])
def test_a_config_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StreamConfig(**wrong)


def test_a_split_smaller_than_a_step(folder: Folder, manifest: Manifest) -> None:
    config = StreamConfig(num_lanes=7, rows_per_microbatch=3)
    with pytest.raises(DataError, match=r"20 rows where .* takes 21\. Give at least 21 rows"):
        Plan.of(folder, manifest, "validation", config)
    Plan.of(folder, manifest, "validation", replace(config, num_lanes=6))


def test_the_order_is_pinned(plan: Plan) -> None:
    """Resumed runs depend on this order."""
    assert stream._permutation(6, 1, 2, 3).tolist() == [0, 2, 3, 1, 4, 5]
    assert take(read(plan, (1,), 11), 1)[0][1][:, 0].tolist() == [196, 198, 197]


def test_seeds_and_epochs_have_orders_of_their_own(plan: Plan) -> None:
    orders = {
        tuple(stream._permutation(50, seed, epoch, nth))
        for seed in (0, 1, 2**64 - 1)
        for epoch in (0, 1)
        for nth in (0, 1, stream.HOLDOUT)
    }
    assert len(orders) == 3 * 2 * 3
    other = replace(plan, config=replace(CONFIG, seed=4))
    assert not same(take(read(other, (0,)), 5), take(read(plan, (0,)), 5))


def test_an_id_out_of_range_mid_stream(plan: Plan) -> None:
    small = replace(plan.manifest.vocabulary, size=900 + ROWS - 1)  # only the last row breaks it
    spoilt = replace(plan, manifest=replace(plan.manifest, vocabulary=small))
    with pytest.raises(DataError, match=r"part-00003\.parquet row group 5 row 2: id 1129 where"):
        take(read(spoilt, range(4)), 30)


def corrupted(folder: Folder, manifest: Manifest, to: Path) -> Plan:
    """A plan over a copy of the shards, one of which is spoilt once it is planned."""
    copy = Folder.at(str(to))
    for file in manifest.files("train"):
        copy.write_bytes(file.name, folder.read_bytes(file.name))
    plan = Plan.of(copy, manifest, "train", CONFIG)
    copy.write_bytes("train/part-00002.parquet", b"PAR1 torn")
    return plan


def test_a_corrupt_file_mid_epoch(folder: Folder, manifest: Manifest, tmp_path: Path) -> None:
    spoilt = corrupted(folder, manifest, tmp_path)
    with pytest.raises(DataError, match=r"part-00002\.parquet row group \d: not readable"):
        take(read(spoilt, range(4)), 30)


def test_a_corrupt_file_that_is_skipped(folder: Folder, manifest: Manifest, tmp_path: Path) -> None:
    """Its rows, and no others, are replaced, by sound rows of the same window; the rest stays."""
    config = replace(CONFIG, window_groups=6)
    spoilt = replace(
        corrupted(folder, manifest, tmp_path), config=replace(config, corrupt="skip"), skipped={}
    )
    steps = 40  # two epochs and more
    healthy = take(read(Plan.of(folder, manifest, "train", config), range(4)), steps)
    corrupt = range(2 * 64, 3 * 64)  # the rows of the file
    replaced = 0
    for ours, theirs in zip(take(read(spoilt, range(4)), steps), healthy, strict=True):
        for lane in range(4):
            bad_R = np.isin(theirs[lane][:, 0], corrupt)
            np.testing.assert_array_equal(ours[lane][~bad_R], theirs[lane][~bad_R])
            assert not np.isin(ours[lane][:, 0], corrupt).any()
            replaced += bad_R.sum()
    assert 0 < replaced <= sum(spoilt.skipped.values()) <= replaced + len(corrupt)
    assert sum(n for (epoch, _), n in spoilt.skipped.items() if epoch == 0) == len(corrupt)
    again = take(read(spoilt, range(4), 17), 5)
    assert same(again, take(read(spoilt, range(4)), 22)[17:])


def test_a_window_with_nothing_sound_in_it(
    folder: Folder, manifest: Manifest, tmp_path: Path
) -> None:
    spoilt = corrupted(folder, manifest, tmp_path)
    spoilt = replace(spoilt, config=replace(CONFIG, corrupt="skip"), skipped={})
    for file in manifest.files("train"):
        spoilt.folder.write_bytes(file.name, b"PAR1 torn")
    with pytest.raises(DataError, match="not readable"):
        take(read(spoilt, range(4)), 1)


def test_planning_checks_the_files(folder: Folder, manifest: Manifest, tmp_path: Path) -> None:
    spoilt = corrupted(folder, manifest, tmp_path)
    with pytest.raises(DataError, match=r"part-00002\.parquet: 9 bytes where"):
        Plan.of(spoilt.folder, manifest, "train", CONFIG)


def test_holdout(folder: Folder, manifest: Manifest) -> None:
    some = holdout(folder, manifest, "train", 40, seed=5)
    assert some.shape == (40, L)
    assert some.dtype == np.int64
    assert len(set(some[:, 0])) == 40
    np.testing.assert_array_equal(some - some[:, :1], np.tile([0, 300, 600, 900], (40, 1)))
    np.testing.assert_array_equal(holdout(folder, manifest, "train", 9, seed=5), some[:9])
    whole = holdout(folder, manifest, "train", ROWS, seed=5)
    assert sorted(whole[:, 0]) == list(range(ROWS))
    assert not np.array_equal(holdout(folder, manifest, "train", 40, seed=6), some)
    for rows in (0, ROWS + 1):
        with pytest.raises(ConfigError, match=f"{rows} of the {ROWS} rows"):
            holdout(folder, manifest, "train", rows, seed=5)


@pytest.fixture
def short_horizons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "WINDOWS_PER_HORIZON", 16)
    monkeypatch.setattr(readahead, "STEPS_AHEAD", 2)


@pytest.mark.usefixtures("ray_cluster", "short_horizons")
def test_ray_reads_the_same_and_rests(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    looks: dict[StreamingExecutor, list[float]] = defaultdict(list)
    look = StreamingExecutor._scheduling_loop_step

    def noting(self: StreamingExecutor, *arguments: Any) -> bool:
        looks[self].append(time.monotonic())
        return look(self, *arguments)

    monkeypatch.setattr(StreamingExecutor, "_scheduling_loop_step", noting)
    for lanes, step in (((0, 2), 0), ((1, 3), 33)):
        batches = ray_batches(alone(plan), lanes, step)
        assert same(take(batches, 25), take(read(plan, lanes, step), 25))  # over three horizons
        batches.close()
        assert "stream" not in [thread.name for thread in threading.enumerate()]
    assert len(looks) > 3  # horizons
    for times in looks.values():
        assert len(times) > 1
        assert np.diff(times).min() >= readahead.PAUSE_S, "a thread that never waits slows training"


@pytest.mark.usefixtures("ray_cluster", "short_horizons")
def test_ray_raises_the_error_itself(folder: Folder, manifest: Manifest, tmp_path: Path) -> None:
    spoilt = corrupted(folder, manifest, tmp_path)
    healthy = Plan.of(folder, manifest, "train", CONFIG)
    good = read(healthy, range(4))
    seen: list[dict[int, np.ndarray]] = []
    with pytest.raises(DataError, match=r"part-00002\.parquet row group \d: not read") as caught:
        seen.extend(ray_batches(alone(spoilt), range(4)))
    assert type(caught.value) is DataError
    assert len(seen) < 30
    assert same(seen, take(good, len(seen)))

    config = replace(CONFIG, window_groups=6, corrupt="skip")
    skipping = replace(spoilt, config=config, skipped={})
    around = ray_batches(alone(skipping), range(4))
    assert same(take(around, 25), take(read(skipping, range(4)), 25))
    assert sum(skipping.skipped.values()) > 0
    around.close()
