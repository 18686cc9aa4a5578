"""The microbatches of a step, from one source of rows or several: which of them each comes from.

The microbatch of (step, lane) comes from one source, which is a function of (seed, step, lane) and
the weights alone: neither a restart nor another number of workers changes it. Lane k walks through
the multiples of the golden ratio from an offset of its own, and takes the source whose share of the
unit interval holds the fractional part. So of any n steps of a lane in a row, a source of share w
has n·w up to a term of order log(n). A source is read in its own order, as if it were alone: the
n-th microbatch that a lane takes from it is the n-th of that lane.

Shapes: S sources, N steps or rows, R rows of a microbatch, L positions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, count, pairwise

import numpy as np

from infra.errors import DataError
from infra.shards import Manifest, read_manifest
from infra.storage import Folder
from infra.stream import MIXING, Pieces, Plan, StreamConfig, philox, pieces

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
NAME = re.compile(r"\w[\w. -]{,99}")  # of a source
AT_ONCE = 1 << 20  # steps of a lane that are counted together

Weights = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Change:
    """Other weights from a step on, counted from 1."""

    step: int
    weights: Weights


ALONE = ""  # the name of a source that is not one of several


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Several sources of one vocabulary and length.

    sources: addresses of shards, by names of your choice, which become parts of metrics' names.
    weights: the share of the microbatches that each source has, up to a common factor; a source
    that is not named has none. changes: other weights from given steps on, in ascending order.
    """

    sources: dict[str, str]
    weights: Weights
    changes: tuple[Change, ...] = ()

    @classmethod
    def alone(cls, url: str) -> MixtureConfig:
        """The mixture of one source, whose order is that of the source itself."""
        return cls(sources={ALONE: url}, weights={ALONE: 1.0})

    def shares(self, step: int) -> Weights:
        """The share of every source from a step on, counted from 1; they sum to 1."""
        held = [self.weights, *(c.weights for c in self.changes if c.step <= step)][-1]
        return {name: held.get(name, 0.0) / sum(held.values()) for name in self.sources}

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources must name at least one")
        refused = [name for name in self.sources if not NAME.fullmatch(name)]
        if refused and list(self.sources) != [ALONE]:
            why = "is letters, digits, _ . - and spaces"
            raise ValueError(f"the name of a source {why}, got {refused[0]!r}")
        for weights in (self.weights, *(change.weights for change in self.changes)):
            if unknown := sorted(set(weights) - set(self.sources)):
                raise ValueError(f"weights name {unknown[0]}, which is none of the sources")
            shares = list(weights.values())
            if not 0 < sum(shares) < math.inf or min(shares) < 0:
                why = "weights are at least 0, and their sum is positive and finite"
                raise ValueError(f"{why}, got {weights}")
        steps = [1, *(change.step for change in self.changes)]
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError(f"changes come at ascending steps from 2 on, got {steps[1:]}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which source every microbatch comes from; sources are numbered in their order."""

    config: MixtureConfig
    seed: int

    def names(self, lanes: Sequence[int], step: int) -> dict[int, str]:
        """The name of the source of each lane's next microbatch, after `step` microbatches."""
        there = list(self.config.sources)
        return {lane: there[self.source(lane, step)] for lane in lanes}

    def source(self, lane: int, step: int) -> int:
        """The index of the source of a lane's next microbatch, after `step` microbatches."""
        return int(self._sources(lane, step, step + 1)[0])

    def before(self, lane: int, step: int) -> list[int]:
        """How many of the first `step` microbatches of a lane come from each source, ``[S]``."""
        counts_S = np.zeros(len(self.config.sources), np.int64)
        for first in range(0, step, AT_ONCE):
            sources_N = self._sources(lane, first, min(first + AT_ONCE, step))
            counts_S += np.bincount(sources_N, minlength=len(counts_S))
        return counts_S.tolist()

    def _sources(self, lane: int, first: int, last: int) -> np.ndarray:
        """The numbers of the sources of steps ``[first, last)``."""
        (offset,) = philox(self.seed, lane, MIXING).random_raw(1)
        steps_N = np.arange(first, last, dtype=np.uint64)
        place_N = (np.uint64(offset) + steps_N * np.uint64(GOLDEN)) >> np.uint64(1)
        sources_N = np.empty(last - first, np.int64)
        for begin, end, edges_S in self._spans:
            here = slice(max(begin - first, 0), max(min(end, last) - first, 0))
            sources_N[here] = np.searchsorted(edges_S, place_N[here], side="right")
        return sources_N

    @cached_property
    def _spans(self) -> list[tuple[int, int, np.ndarray]]:
        """The steps (from 0) between two changes, and where the share of each source but the last
        ends there, in units of 2^-63."""
        begins = [0, *(change.step - 1 for change in self.config.changes), 1 << 62]
        weights = [self.config.weights, *(change.weights for change in self.config.changes)]
        return [
            (begin, end, self._edges(shares))
            for (begin, end), shares in zip(pairwise(begins), weights, strict=True)
        ]

    def _edges(self, weights: Weights) -> np.ndarray:
        shares = [Fraction(weights.get(name, 0)) for name in self.config.sources]
        ends = accumulate(shares[:-1])
        return np.array([math.floor(end / sum(shares) * 2**63) for end in ends], np.uint64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture(Schedule):
    """Which microbatches come when: the schedule, and the order of each source by itself, all with
    one configuration."""

    plans: tuple[Plan, ...]

    @classmethod
    def of(
        cls,
        config: MixtureConfig,
        manifests: Mapping[str, Manifest],
        split: str,
        stream: StreamConfig,
    ) -> Mixture:
        """Check the files of all sources, and plan their order; DataError where one is not as its
        manifest says."""
        plans = (
            Plan.of(Folder.at(url), manifests[name], split, stream)
            for name, url in config.sources.items()
        )
        return cls(config=config, seed=stream.seed, plans=tuple(plans))


def read(
    order: Mixture, lanes: Sequence[int], start_step: int = 0
) -> Iterator[dict[int, np.ndarray]]:
    """Each step's microbatches from `start_step` on, endless: {lane: ids [R, L] int64}."""
    return microbatches(order, lanes, start_step, pieces)


def microbatches(
    order: Mixture,
    lanes: Sequence[int],
    start_step: int,
    read_source: Callable[[Plan, Sequence[int], Sequence[int]], Pieces],
) -> Iterator[dict[int, np.ndarray]]:
    """Each step's microbatches, as `read` gives them, cut from what `read_source` reads of each.

    A source is opened when the first microbatch of its own is due.
    """
    opened: dict[int, _Rows] = {}
    with ExitStack() as stack:
        for step in count(start_step):
            batch = {}
            for lane in lanes:
                nth = order.source(lane, step)
                if nth not in opened:
                    plan = order.plans[nth]
                    steps = [order.before(each, step)[nth] for each in lanes]
                    found = stack.enter_context(closing(read_source(plan, lanes, steps)))
                    opened[nth] = _Rows(plan, lanes, found)
                batch[lane] = opened[nth].take(lane)
            yield batch


class _Rows:
    """Cuts the pieces of a source into the microbatches of its lanes."""

    def __init__(self, plan: Plan, lanes: Sequence[int], pieces: Pieces) -> None:
        self.size, self.pieces = plan.config.rows_per_microbatch, pieces
        empty_NL = np.empty((0, plan.manifest.length), plan.manifest.dtype)
        self.ready = dict.fromkeys(lanes, empty_NL)

    def take(self, lane: int) -> np.ndarray:
        while len(self.ready[lane]) < self.size:
            owner, piece_NL = next(self.pieces)
            self.ready[owner] = np.concatenate([self.ready[owner], piece_NL])
        taken_RL, self.ready[lane] = np.split(self.ready[lane], [self.size])
        return taken_RL.astype(np.int64)


def read_manifests(config: MixtureConfig) -> dict[str, Manifest]:
    """Of all sources, by name; DataError where two differ in what the network must know."""
    manifests = {name: read_manifest(url) for name, url in config.sources.items()}
    (first, one), *others = manifests.items()
    for name, other in others:
        for what, ours, theirs in (
            ("vocabulary", one.vocabulary.sha256, other.vocabulary.sha256),
            ("length", one.length, other.length),
        ):
            if ours != theirs:
                why = f"its {what} is not that of {first} ({config.sources[first]})"
                raise DataError(config.sources[name], why, f"Prepare both with one {what}")
    return manifests
