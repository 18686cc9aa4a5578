"""One source of rows in flight: lanes and windows, an order that does not depend on the number of
workers.

In every epoch the row groups of a split are permuted and cut into windows of a few groups, and the
rows of each window are permuted. Lane k reads windows k, k + lanes, … in every epoch; the
microbatch of a step is the next R rows of the lane. All permutations come from a counter-based
generator keyed (seed, epoch, window), so a microbatch is a function of (seed, step, lane), and
the position of any step is found without reading.

Shapes: N rows, L positions, R rows of a microbatch, G row groups.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count
from typing import Literal, NamedTuple

import numpy as np

from infra.config import at_least
from infra.errors import ConfigError, DataError
from infra.shards import Manifest, check_files, read_group
from infra.storage import Folder

# The generator's streams for `holdout` and for mixtures: beyond those of all windows.
HOLDOUT, MIXING = (1 << 64) - 1, (1 << 64) - 2

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What fixes the order of the rows.

    `num_lanes` microbatches of `rows_per_microbatch` rows are a global step, whatever the number of
    workers; `window_groups` row groups are shuffled together, and held in memory per lane.
    A `corrupt` row group stops the run; with "skip" other rows of its window replace it, which are
    counted, and the order of all other rows stays the same.
    """

    seed: int = 0
    num_lanes: int = 1
    rows_per_microbatch: int = 8
    window_groups: int = 4
    corrupt: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2^64), got {self.seed}")
        at_least(1, self, "num_lanes", "rows_per_microbatch", "window_groups")

    @property
    def rows_per_step(self) -> int:
        """Of all lanes together."""
        return self.num_lanes * self.rows_per_microbatch

    def lanes(self, rank: int, world_size: int) -> tuple[int, ...]:
        """The lanes that a worker serves: those congruent to its rank."""
        if self.num_lanes % world_size:
            raise ConfigError(
                "stream.num_lanes",
                f"{self.num_lanes} lanes cannot be shared out evenly to {world_size} workers",
                f"Choose a multiple of {world_size}",
            )
        return tuple(range(rank, self.num_lanes, world_size))


class Position(NamedTuple):
    """A place in a lane: the epoch, the window within it, the row within that."""

    epoch: int
    window: int
    row: int


class Slice(NamedTuple):
    """Rows [start, stop) of one row group of one file."""

    name: str
    group: int
    start: int
    stop: int


class Window(NamedTuple):
    """A window to read: its slices, the key of its permutation, and how many rows to skip."""

    slices: tuple[Slice, ...]
    seed: int
    epoch: int
    index: int
    skip: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The order of one split, computed from the footers alone."""

    folder: Folder
    manifest: Manifest
    split: str
    config: StreamConfig
    file_G: np.ndarray
    group_G: np.ndarray  # index within its file
    rows_G: np.ndarray
    skipped: dict[tuple[int, int], int] = field(default_factory=dict)  # (epoch, window) -> rows

    @classmethod
    def of(cls, folder: Folder, manifest: Manifest, split: str, config: StreamConfig) -> Plan:
        """Check the split's files and plan their order; DataError if one is not as written."""
        rows = check_files(folder, manifest, split)
        plan = cls(
            folder=folder,
            manifest=manifest,
            split=split,
            config=config,
            file_G=np.repeat(np.arange(len(rows)), [len(groups) for groups in rows]),
            group_G=np.concatenate([np.arange(len(groups)) for groups in rows]),
            rows_G=np.concatenate([np.asarray(groups) for groups in rows]),
        )
        needed = config.rows_per_step
        if plan.rows < needed:
            raise DataError(
                (folder / split).url,
                f"{plan.rows} rows where one step of {config.num_lanes} lanes takes {needed}",
                f"Give at least {needed} rows, or fewer lanes or rows per microbatch",
            )
        return plan

    @cached_property
    def rows(self) -> int:
        return int(self.rows_G.sum())

    @cached_property
    def num_windows(self) -> int:
        """Windows of an epoch: a multiple of the lanes, so that all lanes are equally long."""
        lanes = self.config.num_lanes
        return lanes * max(1, len(self.rows_G) // (self.config.window_groups * lanes))

    def read(self, window: Window) -> np.ndarray:
        """The rows of a window in their order, [N, L].

        DataError names file and row of a corrupt one, unless it is to be skipped and the window
        has others.
        """
        rows_NL, replaced = read_window(self.folder, self.manifest, window, self.config.corrupt)
        if replaced:
            self.skipped[window.epoch, window.index] = replaced
        return rows_NL

    def seek(self, lane: int, step: int) -> Position:
        """Where the microbatch of a step begins."""
        windows = np.arange(lane, self.num_windows, self.config.num_lanes)
        ends = np.cumsum(self._edge(windows + 1) - self._edge(windows))
        epoch, row = divmod(step * self.config.rows_per_microbatch, int(ends[-1]))
        nth = int(np.searchsorted(ends, row, side="right"))
        return Position(epoch, int(windows[nth]), row - int(ends[nth - 1] if nth else 0))

    def windows(self, lanes: Sequence[int], steps: Sequence[int]) -> Iterator[tuple[int, Window]]:
        """Endless (lane, window) pairs from a step of each lane on, in the order in which rows are
        needed."""
        layout = lru_cache(maxsize=2)(self._layout)  # lanes are in two epochs at the turn of one
        return (
            (lane, self._window(layout(place.epoch), place))
            for _, lane, place in heapq.merge(*map(self._places, lanes, steps))
        )

    def _places(self, lane: int, step: int) -> Iterator[tuple[int, int, Position]]:
        """(rows of the lane before it, lane, position) of every window to read."""
        place, before = self.seek(lane, step), 0
        for epoch in count(place.epoch):
            for window in range(place.window, self.num_windows, self.config.num_lanes):
                yield before, lane, Position(epoch, window, place.row)
                before += self._edge(window + 1) - self._edge(window) - place.row
                place = Position(epoch, window, 0)
            place = Position(epoch + 1, lane, 0)

    def _edge(self, window: int | np.ndarray) -> int | np.ndarray:
        """The row at which a window begins in its epoch's order of groups.

        It is the same in every epoch: windows are cut by rows, if need be through a group.
        Otherwise `seek` would have to walk through all epochs.
        """
        return window * self.rows // self.num_windows

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's order of groups, and the row of the epoch at which each ends."""
        order_G = _permutation(len(self.rows_G), self.config.seed, epoch, 0)
        return order_G, np.cumsum(self.rows_G[order_G])

    def _window(self, layout: tuple[np.ndarray, np.ndarray], place: Position) -> Window:
        order_G, ends_G = layout
        files = self.manifest.files(self.split)
        start, stop = self._edge(place.window), self._edge(place.window + 1)
        first, last = np.searchsorted(ends_G, (start, stop - 1), side="right")
        slices = []
        for nth in range(first, last + 1):
            group, end = order_G[nth], int(ends_G[nth])
            begin = end - int(self.rows_G[group])
            name, index = files[self.file_G[group]].name, int(self.group_G[group])
            slices.append(Slice(name, index, max(start - begin, 0), min(stop, end) - begin))
        return Window(tuple(slices), self.config.seed, place.epoch, place.window, place.row)


def read_window(
    folder: Folder, manifest: Manifest, window: Window, corrupt: Literal["stop", "skip"] = "stop"
) -> tuple[np.ndarray, int]:
    """The rows of a window in their order, [N, L], and how many of them replace corrupt ones.

    DataError names file and row of a corrupt one; with "skip", only if the window has no others.
    """
    pieces: list[np.ndarray | None] = []
    problem = None
    for name, group, start, stop in window.slices:
        try:
            pieces.append(read_group(folder, manifest, name, group)[start:stop])
        except DataError as error:
            if corrupt == "stop":
                raise
            log.warning("%d rows skipped: %s", stop - start, error)
            pieces.append(None)
            problem = error
    sound = [piece_NL for piece_NL in pieces if piece_NL is not None]
    if problem and not sound:
        raise problem
    spare_NL = np.concatenate(sound)
    sizes = [piece.stop - piece.start for piece in window.slices]
    rows_NL = np.concatenate(
        [
            np.resize(spare_NL, (size, manifest.length)) if piece_NL is None else piece_NL
            for piece_NL, size in zip(pieces, sizes, strict=True)
        ]
    )
    order_N = _permutation(len(rows_NL), window.seed, window.epoch, 1 + window.index)
    return rows_NL[order_N[window.skip :]], len(rows_NL) - len(spare_NL)


Pieces = Iterator[tuple[int, np.ndarray]]  # endless: (lane, some of its rows [N, L])


def pieces(plan: Plan, lanes: Sequence[int], steps: Sequence[int]) -> Pieces:
    """The rows of lanes from a step of each on, in the order in which they are needed."""
    return ((lane, plan.read(window)) for lane, window in plan.windows(lanes, steps))


def holdout(folder: Folder, manifest: Manifest, split: str, rows: int, seed: int) -> np.ndarray:
    """A fixed random subset for evaluation, without replacement: ids [rows, L] int64.

    With the same seed, fewer rows are the first of more.
    """
    groups = [
        (file.name, index, count)
        for file, counts in zip(
            manifest.files(split), check_files(folder, manifest, split), strict=True
        )
        for index, count in enumerate(counts)
    ]
    ends_G = np.cumsum([count for *_, count in groups])
    if not 1 <= rows <= ends_G[-1]:
        raise ConfigError(
            "rows", f"{rows} of the {ends_G[-1]} rows of {(folder / split).url}", "Ask for fewer"
        )
    chosen_N = _permutation(int(ends_G[-1]), seed, 0, HOLDOUT)[:rows]
    group_N = np.searchsorted(ends_G, chosen_N, side="right")
    chosen_NL = np.empty((rows, manifest.length), np.int64)
    for group in np.unique(group_N):
        name, index, count = groups[group]
        mine_N = np.flatnonzero(group_N == group)
        within_N = chosen_N[mine_N] - (ends_G[group] - count)
        chosen_NL[mine_N] = read_group(folder, manifest, name, index)[within_N]
    return chosen_NL


def _permutation(size: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """A permutation of range(size) keyed (seed, epoch, stream).

    From the generator's raw bits, which numpy never changes, unlike its distributions.
    """
    return np.argsort(philox(seed, epoch, stream).random_raw(size), kind="stable")


def philox(seed: int, number: int, stream: int) -> np.random.Philox:
    """A counter-based generator of its own for (seed, number, stream)."""
    key, counter = np.array([seed, number], np.uint64), np.array([0, 0, 0, stream], np.uint64)
    return np.random.Philox(key=key, counter=counter)
