"""Turn text into shards of tokens for train, validation and test, with a manifest.

    python pipelines/prepare.py quickstart
    python pipelines/prepare.py source='s3://bucket/owt/*.parquet' out=s3://bucket/owt-1024 \\
        length=1024 vocabulary.kind=file vocabulary.path=gpt2/

The corpus is streamed up to three times: to measure it, to train a BPE, and to encode it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np

from dsl.errors import VocabularyError
from dsl.vocabulary import TOKENIZER, Vocabulary
from infra import cluster, shards
from infra.config import digest, to_tree
from infra.console import Meter, say
from infra.errors import ConfigError, DataError
from infra.lease import held
from infra.shards import MANIFEST, Manifest, ShardWriter, read_manifest
from infra.storage import Folder
from pipelines import models, verb
from pipelines.corpus import EMBEDDED, Piece, expand, pieces

LARGEST_BPE = 1 << 20  # far beyond it, the tokenizers library ends the process for want of memory
PIECES_AT_ONCE = 512  # some 2 MiB of text, which the tokenizer spreads over its threads


@dataclass(frozen=True, kw_only=True)
class Char:
    """text8's 27 characters and an end of document."""

    kind: Literal["char"] = "char"


@dataclass(frozen=True, kw_only=True)
class BPE:
    """Byte-level BPE of at most `size` tokens, trained on the training split."""

    kind: Literal["bpe"] = "bpe"
    size: int = 2048

    def __post_init__(self) -> None:
        if not 257 <= self.size <= LARGEST_BPE:
            raise ValueError(f"size must be 257 to {LARGEST_BPE:,}, got {self.size}")


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """A `tokenizer.json`, or a folder that holds one or GPT-2's two files."""

    path: str
    kind: Literal["file"] = "file"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Where the text comes from, how it is cut, and where the shards go.

    `validation` and `test` are the shares of characters at the end of the corpus. `blocks` is
    `eos` (documents joined with an end mark and cut to `length`) or `bos_eos` (each row opened by
    BOS and closed by EOS, as MDLM does).
    """

    out: str
    source: str = EMBEDDED
    text_field: str = "text"
    length: int = 1024
    blocks: Literal["eos", "bos_eos"] = "eos"
    validation: float = 0.05
    test: float = 0.05
    vocabulary: Char | BPE | TokenizerFile = field(default_factory=BPE)
    existing: Literal["resume", "restart"] = "resume"

    def __post_init__(self) -> None:
        if not 4 <= self.length <= shards.LONGEST_ROW:
            most = f"{shards.LONGEST_ROW:,} at most"
            raise ValueError(f"length must be at least 4 tokens, and {most}, got {self.length}")
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ValueError("validation and test are shares in [0, 1) that leave some to train on")


def execute(config: PrepareConfig) -> dict[str, Any]:
    out = Folder.at(config.out)
    if out.exists(MANIFEST) and config.existing == "resume":
        return _finished(config, read_manifest(out))
    _require_apart(config, out)
    sizes = _measure(config)
    vocabulary = _vocabulary(config, sizes)
    with held(out / MANIFEST) as lease:
        manifest = _written(config, out, sizes, vocabulary, lease.confirm)
    return _summary(out, manifest)


def _written(
    config: PrepareConfig,
    out: Folder,
    sizes: dict[str, int],
    vocabulary: Vocabulary,
    permit: Callable[[], None],
) -> Manifest:
    with ShardWriter(
        out,
        vocabulary=shards.VocabularyRecord(
            kind=config.vocabulary.kind, sha256=vocabulary.sha256, size=vocabulary.size
        ),
        length=config.length,
        source=config.source,
        split_rule=f"by characters, in order: {_train_share(config):g} train, "
        f"{config.validation:g} validation, {config.test:g} test",
        blocks=config.blocks,
        commit=str(cluster.commit() or ""),
        overwrite=True,
        permit=permit,
    ) as writer:
        out.write_bytes(TOKENIZER, vocabulary.to_json().encode())
        writer.extra |= {"config": _identity(config), "text": {}}
        stream = pieces(config.source, config.text_field)
        for split in (split for split, size in sizes.items() if size):
            meter = Meter(f"prepare {split}", sizes[split], "pieces")
            shown = meter.over(islice(stream, sizes[split]))
            text = _encode(shown, vocabulary, config, split, writer)
            if not text["rows"]:
                why = f"its {split} split has {text['tokens']:,} tokens, too few for a row"
                fix = "Give more text or a smaller length"
                fix += "" if split == "train" else f", or {split}=0"
                raise DataError(config.source, why, fix)
            writer.extra["text"][split] = text
    assert writer.manifest is not None
    return writer.manifest


def _require_apart(config: PrepareConfig, out: Folder) -> None:
    """ConfigError where a file of the corpus lies in a folder of shards, and would be removed."""
    taken = [(out / split).url for split in shards.SPLITS]
    for url in [] if config.source == EMBEDDED else expand(config.source):
        if Folder.holding(url)[0].url in taken:
            why = f"{url} of the corpus lies where shards go, and would be removed"
            raise ConfigError("out", why, "Choose another folder")


def _finished(config: PrepareConfig, manifest: Manifest) -> dict[str, Any]:
    """The result of an earlier `prepare` with these settings; ConfigError for other settings."""
    if manifest.extra.get("config") != _identity(config):
        raise ConfigError(
            "out",
            f"{Folder.at(config.out).url} holds shards that were made with other settings",
            "Choose another folder, or existing=restart to make them anew",
        )
    say(f"{config.out} is finished; existing=restart would make it anew")
    return _summary(Folder.at(config.out), manifest)


def _identity(config: PrepareConfig) -> str:
    return digest({k: v for k, v in to_tree(config).items() if k not in ("existing", "out")})


def _summary(out: Folder, manifest: Manifest) -> dict[str, Any]:
    return {
        "data": out.url,
        "digest": manifest.digest,
        "length": manifest.length,
        "vocabulary": manifest.vocabulary.size,
        "rows": {
            split: sum(file.rows for file in files) for split, files in manifest.splits.items()
        },
    }


def _train_share(config: PrepareConfig) -> float:
    return 1 - config.validation - config.test


def _measure(config: PrepareConfig) -> dict[str, int]:
    """The number of pieces in each split, which has its share of the characters."""
    ends = np.cumsum([len(piece.text) for piece in pieces(config.source, config.text_field)])
    if not len(ends):
        raise DataError(config.source, "the corpus is empty", "Give some text")
    train, validation = (
        min(int(np.searchsorted(ends, share * ends[-1])) + 1, len(ends))
        for share in (_train_share(config), 1 - config.test)
    )
    sizes = {"train": train, "validation": validation - train, "test": len(ends) - validation}
    for split, share in (("validation", config.validation), ("test", config.test)):
        if share and not sizes[split]:
            raise DataError(
                config.source,
                f"{int(ends[-1]):,} characters are too few for a {split} share of {share:g}",
                f"Give more text or {split}=0",
            )
    return sizes


def _vocabulary(config: PrepareConfig, sizes: dict[str, int]) -> Vocabulary:
    given = config.vocabulary
    if isinstance(given, Char):
        return Vocabulary.char()
    if isinstance(given, BPE):
        train = islice(pieces(config.source, config.text_field), sizes["train"])
        return Vocabulary.train_bpe((piece.text for piece in train), given.size)
    return models.read_vocabulary(given.path)


def _encode(
    stream: Iterator[Piece],
    vocabulary: Vocabulary,
    config: PrepareConfig,
    split: str,
    writer: ShardWriter,
) -> dict[str, int]:
    """Write the rows of a split; returns counts of their text."""
    framed = config.blocks == "bos_eos"
    body = config.length - 2 * framed
    rest = np.empty(0, np.int64)
    text = {"rows": 0, "tokens": 0, "documents": 0, "characters": 0, "bytes": 0, "dropped": 0}
    for batch, begun in _encodings(stream, vocabulary):
        ids = []
        try:
            encodings = begun.result()
        except VocabularyError as error:
            where = f"{config.source}, {split} behind {text['documents']:,} documents"
            raise DataError(where, str(error)) from None
        for piece, encoded in zip(batch, encodings, strict=True):
            ids += [*encoded, vocabulary.eos] if piece.ends else encoded
            text["documents"] += piece.ends
            text["characters"] += len(piece.text)
            text["bytes"] += len(piece.text.encode())
        rest = np.concatenate([rest, np.array(ids, np.int64)])
        rows_NL = rest[: len(rest) // body * body].reshape(-1, body)
        rest = rest[rows_NL.size :]
        text["rows"] += len(rows_NL)
        text["tokens"] += len(ids)
        if framed:
            rows_NL = np.pad(rows_NL, ((0, 0), (1, 1)))
            rows_NL[:, 0], rows_NL[:, -1] = vocabulary.bos, vocabulary.eos
        writer.write(split, rows_NL)
    text["dropped"] = len(rest)  # tokens behind the last whole row
    return text


def _encodings(
    stream: Iterator[Piece], vocabulary: Vocabulary
) -> Iterator[tuple[list[Piece], Future[list[list[int]]]]]:
    """Batches of pieces and their future ids; the next batch is read and encoded meanwhile."""
    waiting = None
    with ThreadPoolExecutor(1) as ahead:
        while batch := list(islice(stream, PIECES_AT_ONCE)):
            begun = batch, ahead.submit(vocabulary.encode, [piece.text for piece in batch])
            if waiting:
                yield waiting
            waiting = begun
        if waiting:
            yield waiting


def dry_run(config: PrepareConfig) -> dict[str, Any]:
    files = [config.source] if config.source == EMBEDDED else expand(config.source)
    return {
        "source": config.source,
        "files": len(files),
        "out": config.out,
        "length": config.length,
        "vocabulary": to_tree(config.vocabulary),
    }


def main() -> int:
    return verb.run("prepare", PrepareConfig, plan=dry_run, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
