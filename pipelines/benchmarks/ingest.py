"""Shards to microbatches, and text to shards, against the libraries that do the bare work.

Shapes: N rows, L positions.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch

from dsl.vocabulary import TOKENIZER
from infra import cluster, readahead, shards
from infra.cluster import ClusterConfig
from infra.mixture import Mixture, MixtureConfig, read_manifests
from infra.shards import ROWS_PER_GROUP, ShardWriter
from infra.stream import StreamConfig
from pipelines import prepare
from pipelines.benchmarks.measure import interleaved
from pipelines.benchmarks.results import Bar, ratio, table
from pipelines.benchmarks.settings import BenchmarkConfig, IngestConfig
from pipelines.corpus import pieces
from pipelines.prepare import PrepareConfig, TokenizerFile
from pipelines.report import Row, Table

CPU = torch.device("cpu")
WAIT_S = 4.0
IDS = shards.VocabularyRecord(kind="bpe", sha256="0" * 64, size=50257)
FACTS = {"source": "random", "split_rule": "all", "blocks": "eos"}


def run(config: BenchmarkConfig) -> Table:
    size, rounds = config.ingest, config.rounds
    with tempfile.TemporaryDirectory() as place:
        rows = [*reading(size, rounds, Path(place)), preparing(size, rounds, Path(place))]
    note = (
        f"{size.rows:,} rows of {size.length} random tokens on this machine's disk, read in the "
        f"shuffled order of training by one worker. Text: {size.megabytes} MB of {size.source}."
    )
    return table("Ingest", note, rows)


def reading(size: IngestConfig, rounds: int, place: Path) -> Iterator[Row]:
    """The stream by Ray Data, against a scan of the same files by the Parquet library; and what it
    takes from a training that is slower."""
    import ray

    draws = np.random.default_rng(0)
    with ShardWriter(str(place), vocabulary=IDS, length=size.length, **FACTS) as writer:
        for first in range(0, size.rows, ROWS_PER_GROUP):
            count = min(ROWS_PER_GROUP, size.rows - first)
            writer.write("train", draws.integers(IDS.size, size=(count, size.length)))
    with cluster.connected(ClusterConfig()):
        # In a worker, as in training; Ray ends the read-ahead together with it.
        timed, waiting_s = ray.get(ray.remote(_read).remote(place, size.rows, rounds))
    ours_R, theirs_R = (size.rows * size.length / 1e6 / timed[name] for name in ("ray", "parquet"))
    here = (size.rows, size.length) == (IngestConfig.rows, IngestConfig.length)
    bar = Bar("≥", 5.0, here, unit="M tokens/s")
    what, against = "stream by Ray Data", "bare Parquet"
    yield ratio("ray", what, against, ours_R, theirs_R, unit=bar.unit, bar=bar)
    what, against = "CPU of the open stream while nobody reads", "one core"
    yield ratio("waiting", what, against, waiting_s, WAIT_S, bar=Bar("≤", 0.05, here))


def _read(place: Path, rows: int, rounds: int) -> tuple[dict[str, np.ndarray], float]:
    """Seconds of either side in each round, and of the CPU while the stream waits `WAIT_S`."""
    import pyarrow.parquet as pq

    alone = MixtureConfig.alone(str(place))
    order = Mixture.of(alone, read_manifests(alone), "train", StreamConfig())
    microbatches = readahead.ray_batches(order, (0,))

    def scan(number: int) -> None:
        for file in sorted((place / "train").iterdir()):
            pq.read_table(file, columns=["tokens"], use_threads=False)

    sides = {"ray": lambda number: take(microbatches, rows), "parquet": scan}
    timed = interleaved(sides, rounds, CPU)
    time.sleep(WAIT_S)  # what is read ahead has been read
    before = time.process_time()
    time.sleep(WAIT_S)
    return timed, time.process_time() - before


def take(microbatches: Iterator[dict[int, np.ndarray]], rows: int) -> None:
    """Read on until so many more rows have come."""
    while rows > 0:
        rows -= len(next(microbatches)[0])


def preparing(size: IngestConfig, rounds: int, place: Path) -> Row:
    """Everything that `prepare` does, against the tokenizer library on the same documents."""
    from tokenizers import Tokenizer

    texts = documents(size)
    source, vocabulary = place / "text.jsonl", place / "vocabulary"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PrepareConfig(
        source=str(source),
        out=str(vocabulary),
        length=size.length,
        validation=0,
        test=0,
        vocabulary=size.vocabulary,
        existing="restart",
    )
    prepare.execute(config)
    tokenizer = Tokenizer.from_file(str(vocabulary / TOKENIZER))
    given = TokenizerFile(path=str(vocabulary))
    again = replace(config, out=str(place / "prepared"), vocabulary=given)
    timed = interleaved(
        {
            "prepare": lambda number: prepare.execute(again),
            "library": lambda number: tokenizer.encode_batch_fast(texts, add_special_tokens=False),
        },
        rounds,
        CPU,
    )
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ours_R, theirs_R = (megabytes / timed[name] for name in ("prepare", "library"))
    bar = Bar("≥", 0.8, here=isinstance(size.vocabulary, TokenizerFile))
    against = "the tokenizer library's batches"
    return ratio("prepare", "prepare", against, ours_R, theirs_R, unit="MB/s", bar=bar)


def documents(size: IngestConfig) -> list[str]:
    """The first documents of a corpus, which begins again where it is too short."""
    texts, parts, room = [], [], size.megabytes * 10**6
    for piece in chain.from_iterable(map(pieces, repeat(size.source), repeat(size.text_field))):
        parts.append(piece.text[:room])
        room -= len(parts[-1])
        if piece.ends or not room:
            texts.append("".join(parts))
            parts.clear()
        if not room:
            break
    return texts
