"""The work of an evaluation in pieces: each a pure function of the configuration, the models and
the parts before it, and each with a place of its own among the parts.

Shapes: B rows of a job, K bins of confidence, F features.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from dsl.calibration import calibration
from dsl.recorders import Rewrites, Schedule, Sharpening
from dsl.sampling import Sample, sample
from dsl.state import State
from pipelines.evaluation import mauve, measures, metrics
from pipelines.evaluation.bench import Bench
from pipelines.evaluation.cells import Cell, longest
from pipelines.evaluation.mauve import MauveConfig
from pipelines.evaluation.measures import AtSNR, Condition
from pipelines.evaluation.parts import chunks, lists, matrix
from pipelines.evaluation.settings import REFERENCES, EvaluateConfig
from pipelines.kinds import KINDS

TEXTS = 1024  # that are read in one job: reading is quick, and a job has a price of its own


class Job(Protocol):
    """A piece of work; `first` is its number in its `group` of parts."""

    @property
    def group(self) -> str: ...
    @property
    def first(self) -> int: ...
    def run(self, bench: Bench) -> pa.Table: ...


class Done(NamedTuple):
    """What came of a job: how many rows, and the seconds that it took."""

    rows: int
    seconds: float


def worker(config: EvaluateConfig) -> Callable[[Job], Done]:
    """What a process of the pool does with a job: run it and keep the part."""
    bench = Bench(config)

    def work(job: Job) -> Done:
        began = time.perf_counter()
        table = job.run(bench)
        seconds = time.perf_counter() - began
        bench.parts.write(job.group, job.first, table, {"seconds": seconds})
        return Done(len(table), seconds)

    return work


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows that a model is asked about."""

    model: str
    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Nats(Rows):
    """Nats per token of held-out rows by one view of the likelihood."""

    view: str

    @property
    def group(self) -> str:
        return f"parts/likelihood/{self.model}/{self.view}"

    def run(self, bench: Bench) -> pa.Table:
        config, model = bench.config, bench.model(self.model)
        views = {v.name: v for v in measures.views(model.kind, config.likelihood, config.seed)}
        rows_BL = bench.rows(self.first, self.count)
        estimate = views[self.view].measure(model.denoiser, rows_BL, self.first)
        return pa.table({"nats": estimate.mean_B.numpy()})


@dataclass(frozen=True, kw_only=True)
class Errors(Rows):
    """The error of held-out rows in a state."""

    condition: Condition

    @property
    def group(self) -> str:
        return f"parts/states/{self.model}/{measures.slug(self.condition)}"

    def run(self, bench: Bench) -> pa.Table:
        found = measures.errors(
            bench.denoiser(self.model),
            bench.rows(self.first, self.count),
            self.condition,
            seed=bench.config.seed,
            first_row=self.first,
        )
        return pa.table({"nats": found.nats_B.numpy(), "squared": found.squared_B.numpy()})


@dataclass(frozen=True, kw_only=True)
class Calibration(Rows):
    """Predictions of held-out tokens by confidence, at each SNR."""

    @property
    def group(self) -> str:
        return f"parts/calibration/{self.model}"

    def run(self, bench: Bench) -> pa.Table:
        found = calibration(
            bench.denoiser(self.model),
            bench.rows(self.first, self.count),
            gammas=bench.config.states.gammas,
            seed=bench.config.seed,
            first_row=self.first,
        )
        bins = {
            "count": [bins.count_K.tolist() for bins in found.values()],
            "confidence": [bins.confidence_K.tolist() for bins in found.values()],
            "right": [bins.right_K.tolist() for bins in found.values()],
        }
        return pa.table({"gamma": list(found), **bins})


@dataclass(frozen=True, kw_only=True)
class Convert(Rows):
    """What the converter makes of held-out rows at an SNR."""

    condition: AtSNR

    @property
    def group(self) -> str:
        return f"parts/converter/{self.model}/{measures.slug(self.condition)}"

    def run(self, bench: Bench) -> pa.Table:
        found = measures.reading(
            bench.denoiser(self.model),
            bench.rows(self.first, self.count),
            self.condition,
            seed=bench.config.seed,
            first_row=self.first,
        )
        return pa.table(
            {
                "entropy": found.entropy_N.numpy(),
                "mask": found.mask_N.numpy(),
                "token": found.token_N.numpy(),
            }
        )


# --- texts -------------------------------------------------------------------------------------


def draw(bench: Bench, cell: Cell, first: int, count: int, recorders: Any = ()) -> Sample:
    """Texts from nothing along the path of a cell."""
    config, denoiser = bench.config, bench.denoiser(cell.model)
    length = bench.rows(0, 1).shape[1]
    return sample(
        config.samples.sharpen(denoiser, cell.nucleus),
        cell.walk,
        State.masked(count, length, denoiser.config.embed_dim),
        budget=cell.budget,
        seed=config.seed,
        first_row=first,
        recorders=recorders,
    )


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Texts of a cell, with the denoiser calls that each row took part in."""

    cell: Cell
    first: int
    count: int

    @property
    def group(self) -> str:
        return f"samples/{self.cell.name}"

    def run(self, bench: Bench) -> pa.Table:
        drawn = draw(bench, self.cell, self.first, self.count)
        table = texts(drawn.tokens_BL.cpu().numpy(), self.first, bench)
        return table.append_column("calls", pa.array(drawn.row_calls_B.numpy()))


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A cell's first texts again, watched step by step (004 figure 2)."""

    cell: Cell
    first: int = 0

    @property
    def group(self) -> str:
        return f"parts/traces/{self.cell.name}"

    def run(self, bench: Bench) -> pa.Table:
        recorders = (Schedule(), Sharpening(), Rewrites())
        count = min(bench.config.samples.traced, bench.config.samples.rows)
        recorded = draw(bench, self.cell, self.first, count, recorders).recorded
        return pa.table({recorder.name: [json.dumps(_finite(recorded[recorder.name]))]
                         for recorder in recorders})  # fmt: skip


def texts(tokens_BL: np.ndarray, first: int, bench: Bench) -> pa.Table:
    """Rows as they are kept: their numbers, their tokens, and what they say."""
    words = [bench.vocabulary.decode(row) for row in tokens_BL.tolist()]
    numbers = np.arange(first, first + len(tokens_BL))
    return pa.table({"row": numbers, "text": words, "tokens": lists(tokens_BL)})


# --- what others say of texts ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class About:
    """Some texts of a source, which is a cell or held-out text."""

    source: str
    first: int
    count: int

    def texts(self, bench: Bench) -> tuple[list[str], np.ndarray]:
        table = bench.parts.read(f"samples/{self.source}", ["text", "tokens"])
        table = table.slice(self.first, self.count)
        return table["text"].to_pylist(), matrix(table["tokens"], np.int64)


@dataclass(frozen=True, kw_only=True)
class Featurize(About):
    """What MAUVE compares."""

    @property
    def group(self) -> str:
        return f"parts/features/{self.source}"

    def run(self, bench: Bench) -> pa.Table:
        features_BF = bench.featurize(*self.texts(bench))
        return pa.table({"features": lists(features_BF)})


@dataclass(frozen=True, kw_only=True)
class Judge(About):
    """How likely another model finds the texts."""

    @property
    def group(self) -> str:
        return f"parts/judged/{self.source}"

    def run(self, bench: Bench) -> pa.Table:
        judged = bench.judge(*self.texts(bench))
        return pa.table(judged._asdict())


@dataclass(frozen=True, kw_only=True)
class Read(About):
    """What can be counted in each text by itself."""

    @property
    def group(self) -> str:
        return f"parts/read/{self.source}"

    def run(self, bench: Bench) -> pa.Table:
        _, tokens_BL = self.texts(bench)
        known_B, words_B = metrics.word_counts(tokens_BL, bench.vocabulary, bench.words)
        return pa.table(
            {
                "known": known_B,
                "words": words_B,
                "entropy": metrics.entropies(tokens_BL),
                "repetition": metrics.repetitions(tokens_BL),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What can only be said of many texts together: of one repeat of a source."""

    source: str
    first: int  # the first row of the repeat

    @property
    def group(self) -> str:
        return f"parts/whole/{self.source}"

    def run(self, bench: Bench) -> pa.Table:
        tokens_NL = matrix(self._rows(bench, "samples", "tokens"), np.int64)
        found = {f"distinct_{n}": [metrics.distinct(tokens_NL, n)] for n in metrics.NGRAMS}
        if bench.config.mauve:
            found["mauve"] = [self._mauve(bench, bench.config.mauve)]
        return pa.table(found)

    def _mauve(self, bench: Bench, config: MauveConfig) -> list[float] | None:
        """By k-means seed; None for the references themselves, under whatever name."""
        own_NF = matrix(self._rows(bench, "parts/features", "features"), np.float32)
        real = bench.parts.read(f"parts/features/{REFERENCES}")["features"]
        real_NF = matrix(real[: bench.config.samples.rows], np.float32)
        if np.array_equal(own_NF, real_NF):
            return None
        return list(mauve.score(own_NF, real_NF, config).per_seed)

    def _rows(self, bench: Bench, stage: str, column: str) -> pa.ChunkedArray:
        table = bench.parts.read(f"{stage}/{self.source}", [column])
        return table[column][self.first : self.first + bench.config.samples.rows]


# --- all of it ---------------------------------------------------------------------------------


def of_models(
    config: EvaluateConfig, kinds: Mapping[str, str], walked: Sequence[Cell]
) -> list[Job]:
    """What takes the models under evaluation, one model after the other: `kinds` by name."""
    jobs: list[Job] = []
    for model, kind in kinds.items():
        jobs += _asked(config, model, kind)
        own = [cell for cell in walked if cell.model == model]
        rows = list(chunks(config.samples.rows * config.samples.repeats, config.batch))
        jobs += [Draw(cell=cell, first=first, count=n) for cell in own for first, n in rows]
        if config.samples.traced:
            jobs += [Trace(cell=cell) for cell in longest(own)]
    return jobs


def of_texts(config: EvaluateConfig, rows: Mapping[str, int]) -> list[Job]:
    """What is said of each text by itself; `rows` are how many there are of each source."""
    about: list[dict[str, Any]] = [
        {"source": source, "first": first, "count": count}
        for source, total in rows.items()
        for first, count in chunks(total, TEXTS)
    ]
    jobs: list[Job] = [Read(**part) for part in about]
    jobs += [Featurize(**part) for part in about if config.mauve]
    jobs += [Judge(**part) for part in about if config.judge]
    return jobs


def of_corpora(config: EvaluateConfig, rows: Mapping[str, int]) -> list[Job]:
    """What is said of texts together; `rows` are how many there are of each source."""
    size = config.samples.rows
    return [
        Whole(source=source, first=first)
        for source, count in rows.items()
        for first in range(0, count - size + 1, size)
    ]


def _asked(config: EvaluateConfig, model: str, kind: str) -> list[Job]:
    """Everything to ask of a model about held-out rows."""
    jobs: list[Job] = []
    for first, count in chunks(config.likelihood.rows, config.batch):
        rows = {"model": model, "first": first, "count": count}
        views = measures.views(kind, config.likelihood, config.seed)
        jobs += [Nats(view=view.name, **rows) for view in views]
        conditions = measures.conditions(kind, config.states)
        jobs += [Errors(condition=condition, **rows) for condition in conditions]
        readings = measures.readings(kind, config.states)
        jobs += [Convert(condition=condition, **rows) for condition in readings]
        if KINDS[kind].finite_snr and config.states.gammas:
            jobs.append(Calibration(**rows))
    return jobs


def _finite(value: Any) -> Any:
    """What JSON can hold: what is not a number is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None
