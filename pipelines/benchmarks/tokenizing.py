"""Text to shards, beside the tokenizer library."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import torch

from dsl.vocabulary import TOKENIZER
from pipelines import prepare
from pipelines.benchmarks import timing
from pipelines.benchmarks.results import Bar, ratio
from pipelines.benchmarks.settings import IngestConfig
from pipelines.corpus import pieces
from pipelines.prepare import File, PrepareConfig
from pipelines.report import Row


def row(size: IngestConfig, rounds: int, place: Path) -> Row:
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
    given = replace(config, out=str(place / "prepared"), vocabulary=File(path=str(vocabulary)))
    timed = timing.interleaved(
        {
            "prepare": lambda number: prepare.execute(given),
            "library": lambda number: tokenizer.encode_batch_fast(texts, add_special_tokens=False),
        },
        rounds,
        torch.device("cpu"),
    )
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    speed = {name: megabytes / seconds_R for name, seconds_R in timed.items()}
    bar = Bar("≥", 0.8, here=isinstance(size.vocabulary, File))
    ours_R, theirs_R = speed["prepare"], speed["library"]
    against = "the tokenizer library's batches"
    return ratio("prepare", "prepare", against, ours_R, theirs_R, unit="MB/s", bar=bar)


def documents(size: IngestConfig) -> list[str]:
    """The first documents of a corpus, from the beginning again where it ends too soon."""
    texts, parts, room = [], [], size.megabytes * 10**6
    for piece in chain.from_iterable(map(pieces, repeat(size.source), repeat(size.text_field))):
        parts.append(piece.text)
        room -= len(piece.text)
        if piece.ends or room <= 0:
            texts.append("".join(parts))
            parts.clear()
        if room <= 0:
            break
    return texts
