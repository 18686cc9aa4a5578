"""Shards to microbatches, and text to shards, beside the libraries that do the bare work.

Shapes: N rows, L positions.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from infra import cluster, shards, stream
from infra.cluster import ClusterConfig
from infra.shards import ROWS_PER_FILE, ROWS_PER_GROUP, Manifest, ShardWriter, read_manifest
from infra.storage import Folder
from infra.stream import Plan, StreamConfig
from pipelines.benchmarks import timing, tokenizing
from pipelines.benchmarks.results import Bar, ratio, table
from pipelines.benchmarks.settings import BenchmarkConfig, IngestConfig
from pipelines.benchmarks.timing import Procedure
from pipelines.report import Row, Table

CPU = torch.device("cpu")
IDS = shards.VocabularyRecord(kind="bpe", sha256="0" * 64, size=50257)
LARGER = 4  # times as many rows
FACTS = {"source": "random", "split_rule": "all", "blocks": "eos"}
FAST = 5.0  # million tokens a second, of one worker
DEEP = 1_000_000  # the step to resume from


def cost(config: BenchmarkConfig) -> float:
    return 0.0


def run(config: BenchmarkConfig) -> Table:
    size = config.ingest
    with tempfile.TemporaryDirectory() as place:
        rows = [
            *_of_reading(size, config.rounds, Path(place)),
            _of_planning(size, config.rounds, Path(place) / "planned"),
            tokenizing.row(size, config.rounds, Path(place)),
        ]
    note = (
        f"{size.rows:,} rows of {size.length} random tokens, and {LARGER} times as many, on this "
        f"machine's disk, read in the shuffled order of training by one worker. Text: "
        f"{size.megabytes} MB of {size.source}."
    )
    return table("Ingest", note, rows)


def _of_reading(size: IngestConfig, rounds: int, place: Path) -> Iterator[Row]:
    import ray

    small, large = place / "small", place / "large"
    write(small, size.rows, size.length)
    write(large, size.rows * LARGER, size.length)
    with cluster.connected(ClusterConfig()):
        # In a worker, where training reads, and where Ray ends what still reads ahead.
        timed = ray.get(ray.remote(read_all).remote(small, large, size.rows, rounds))
    speed = {name: size.rows * size.length / 1e6 / seconds_R for name, seconds_R in timed.items()}
    peaks = [timing.peak_gib(read_rows, folder, size.rows) for folder in (large, small)]
    here = (size.rows, size.length) == (IngestConfig.rows, IngestConfig.length)
    fast = Bar("≥", FAST, here, unit="M tokens/s")
    rate = partial(ratio, unit=fast.unit, bar=fast)
    again = f"stream of {LARGER} x the rows"
    yield rate("stream", "stream", "bare Parquet", speed["small"], speed["parquet"])
    yield rate("ray", "stream by Ray Data", "bare Parquet", speed["ray"], speed["parquet"])
    yield rate("flat", again, "stream", speed["large"], speed["small"])
    yield ratio("flat_memory", f"{again}, peak", "stream, peak", *peaks, unit="GiB")


def read_all(small: Path, large: Path, rows: int, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each way to read so many rows."""
    streams = {
        "small": stream.read(plan(small), (0,)),
        "large": stream.read(plan(large), (0,)),
        "ray": stream.ray_batches(plan(small), (0,)),
    }
    readers: dict[str, Procedure] = {"parquet": lambda number: scan(small)}
    for name, microbatches in streams.items():
        readers[name] = lambda number, of=microbatches: take(of, rows)
    return timing.interleaved(readers, rounds, CPU)


def _of_planning(size: IngestConfig, rounds: int, place: Path) -> Row:
    """From the manifest to the first window. Reading the footers waits for the store: left out."""
    name = "train/part-{:05d}.parquet"
    files = [
        shards.Shard(name=name.format(i), rows=ROWS_PER_FILE, bytes=1, sha256="0" * 64)
        for i in range(size.shards)
    ]
    splits = {"train": tuple(files)}
    manifest = Manifest(vocabulary=IDS, length=size.length, splits=splits, commit="", **FACTS)
    folder, content = Folder.at(str(place)), manifest.to_json()
    folder.write_bytes(shards.MANIFEST, content)
    groups = ROWS_PER_FILE // ROWS_PER_GROUP

    def resume(number: int) -> object:
        order = Plan(
            folder=folder,
            manifest=read_manifest(folder),
            split="train",
            config=StreamConfig(),
            file_G=np.repeat(np.arange(size.shards), groups),
            group_G=np.tile(np.arange(groups), size.shards),
            rows_G=np.full(size.shards * groups, ROWS_PER_GROUP),
        )
        return next(order.windows((0,), DEEP))

    sides = {"resume": resume, "json": lambda number: json.loads(content)}
    timed = timing.interleaved(sides, rounds, CPU)
    what = f"planning a resume, {size.shards:,} shards"
    bar = Bar("≤", 2.0, here=size.shards == IngestConfig.shards, unit="s")
    return ratio("plan", what, "reading its JSON", timed["resume"], timed["json"], bar=bar)


def write(folder: Path, rows: int, length: int) -> None:
    """Shards of random tokens."""
    draws = np.random.default_rng(0)
    with ShardWriter(str(folder), vocabulary=IDS, length=length, **FACTS) as writer:
        for first in range(0, rows, ROWS_PER_GROUP):
            count = min(ROWS_PER_GROUP, rows - first)
            writer.write("train", draws.integers(IDS.size, size=(count, length)))


def plan(folder: Path) -> Plan:
    place = Folder.at(str(folder))
    return Plan.of(place, read_manifest(place), "train", StreamConfig())


def take(microbatches: Iterator[dict[int, np.ndarray]], rows: int) -> None:
    """Read on until so many more rows have come."""
    while rows > 0:
        rows -= len(next(microbatches)[0])


def read_rows(folder: Path, rows: int) -> None:
    take(stream.read(plan(folder), (0,)), rows)


def scan(folder: Path) -> None:
    """The same rows in the order of the files, by the Parquet library alone."""
    import pyarrow.parquet as pq

    for file in sorted((folder / "train").iterdir()):
        pq.read_table(file, columns=["tokens"], use_threads=False)
