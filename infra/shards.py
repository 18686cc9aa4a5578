"""Tokens at rest: `{train,validation,test}/part-*.parquet` and a manifest that describes them.

The manifest is written last, so a folder that has one is complete. Readers check the files against
the manifest, and name the file, row group and row that is wrong.

Shapes: N rows, L positions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from infra import documents
from infra.credentials import scrub
from infra.errors import ConfigError, DataError, nearest
from infra.storage import Folder, explained

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")
ROWS_PER_GROUP = 1_024
ROWS_PER_FILE = 65_536  # also what a writer buffers per split: 128 MiB at L=1024 and uint16
GROUPS_PER_SPLIT = 64  # at least, where there are as many rows: enough to shuffle and to share out
LONGEST_ROW = 1 << 17
FOOTER_READERS = 16  # threads; a footer in a bucket is all latency


@dataclass(frozen=True, kw_only=True)
class VocabularyRecord:
    """What the ids mean: the kind of vocabulary, its content's sha256 and its V entries."""

    kind: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 1 << 32:
            raise ValueError("a vocabulary has at least one entry, and ids of 32 bits at most")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of rows as it was written; `name` is relative to the manifest's folder."""

    name: str
    rows: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        # A manifest is untrusted: it must not point out of its own folder.
        if not re.fullmatch(r"(\w[\w.-]*/)*\w[\w.-]*", self.name):
            raise ValueError(f"{self.name!r} is not a plain relative file name")
        if self.rows < 1 or self.bytes < 1:
            raise ValueError(f"{self.name} has no rows or no bytes")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record of one `prepare`: what was tokenized, how, and the files that came of it.

    `extra` holds what is not needed to decode the rows, such as the bytes of text per split, from
    which bits per byte are computed.
    """

    vocabulary: VocabularyRecord
    length: int
    splits: dict[str, tuple[Shard, ...]]
    source: str
    split_rule: str
    blocks: str
    commit: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    dtype: str = ""  # of an id at rest; follows from V
    format: int = FORMAT

    def __post_init__(self) -> None:
        dtype = "uint16" if self.vocabulary.size <= 1 << 16 else "uint32"
        if self.dtype not in ("", dtype):
            raise ValueError(f"dtype {self.dtype} where V={self.vocabulary.size} needs {dtype}")
        object.__setattr__(self, "dtype", dtype)
        if not 1 <= self.length <= LONGEST_ROW:
            raise ValueError(f"a row has at least one position, and {LONGEST_ROW:,} at most")
        names = [file.name for files in self.splits.values() for file in files]
        if len(set(names)) < len(names):
            raise ValueError("a file is there twice")
        if unknown := set(self.splits) - set(SPLITS):
            raise ValueError(f"unknown split {min(unknown)!r}; there are {', '.join(SPLITS)}")

    @property
    def digest(self) -> str:
        """A hash that is equal for equal rows, wherever they came from."""
        identity = asdict(self)
        for circumstance in ("source", "commit", "extra"):
            del identity[circumstance]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def rows(self, split: str) -> int:
        return sum(file.rows for file in self.files(split))

    def files(self, split: str) -> tuple[Shard, ...]:
        """The files of a split; ConfigError if there is no such split."""
        if files := self.splits.get(split):
            return files
        there = [name for name, files in self.splits.items() if files]
        near = nearest(split, there)
        hint = f"Did you mean {near}?" if near else f"It has {', '.join(there) or 'no rows at all'}"
        raise ConfigError("split", f"the manifest has no {split!r}", hint)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode() + b"\n"


class ShardWriter:
    """Stream rows into shards; a context that writes the manifest when it ends without error.

    At most ROWS_PER_FILE rows of a split wait in memory. After the block, `manifest` is what was
    written; `extra` may be filled until then. A killed writer leaves no manifest, and the next
    one overwrites its files.
    """

    def __init__(
        self,
        url: str | Folder,
        *,
        overwrite: bool = False,
        permit: Callable[[], None] = lambda: None,
        **about: Any,
    ) -> None:
        """permit: called before a write; raises if this process may no longer write the folder.

        about: the manifest's vocabulary, length, source, split_rule, blocks and commit.
        """
        self.folder, self.permit = Folder.at(url), permit
        self.extra: dict[str, Any] = {}
        self.manifest: Manifest | None = None
        self._draft = Manifest(splits={}, **about)
        self._waiting: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self._files: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        if self.folder.exists(MANIFEST):
            if not overwrite:
                raise ConfigError(
                    self.folder.url,
                    "finished shards are here already",
                    "Choose another folder, or ask to overwrite them",
                )
            self.folder.remove(MANIFEST)  # first, so that a kill from here on leaves no manifest

    def write(self, split: str, rows_NL: np.ndarray) -> None:
        """Append rows of ids to a split; DataError if they are not L ids below V each."""
        if split not in SPLITS:
            raise ConfigError("split", f"{split!r} is none of {', '.join(SPLITS)}")
        rows_NL = np.asarray(rows_NL)
        length, size = self._draft.length, self._draft.vocabulary.size
        if rows_NL.ndim != 2 or rows_NL.shape[1] != length or rows_NL.dtype.kind not in "iu":
            shape = "x".join(map(str, rows_NL.shape))
            raise DataError(split, f"rows of {rows_NL.dtype} {shape}, not of {length} integer ids")
        written = sum(file.rows for file in self._files[split]) + self._rows_waiting(split)
        _check_ids(rows_NL, size, lambda row: f"{split} row {written + row}")
        self._waiting[split].append(rows_NL.astype(self._draft.dtype))
        while self._rows_waiting(split) >= ROWS_PER_FILE:
            self._flush(split)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            return
        for split in SPLITS:
            if self._rows_waiting(split):
                self._flush(split)
        if not any(self._files.values()):
            fix = "Give more text or a smaller length"
            raise DataError(self._draft.source, "it gave not a single row", fix)
        self.permit()
        self._remove_stale()
        splits = {split: tuple(files) for split, files in self._files.items()}
        self.manifest = replace(self._draft, splits=splits, extra=self.extra)
        self.folder.write_bytes(MANIFEST, self.manifest.to_json())

    def _rows_waiting(self, split: str) -> int:
        return sum(map(len, self._waiting[split]))

    def _flush(self, split: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows_NL = np.concatenate(self._waiting[split])
        rows_NL, rest_NL = rows_NL[:ROWS_PER_FILE], rows_NL[ROWS_PER_FILE:]
        self._waiting[split] = [rest_NL] if len(rest_NL) else []
        files = self._files[split]
        # The first file is the whole of a small split, which gets smaller groups.
        group = ROWS_PER_GROUP if files else max(1, len(rows_NL) // GROUPS_PER_SPLIT)
        name = f"{split}/part-{len(files):05d}.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(
            _table(rows_NL, self._draft),
            sink,
            row_group_size=group,
            compression="zstd",
            use_dictionary=False,
            write_page_checksum=True,
            column_encoding="BYTE_STREAM_SPLIT",  # parquet has no 16 bits: halves the zeros
        )
        content = sink.getvalue().to_pybytes()
        self.permit()
        self.folder.write_bytes(name, content)
        digest = hashlib.sha256(content).hexdigest()
        files.append(Shard(name=name, rows=len(rows_NL), bytes=len(content), sha256=digest))

    def _remove_stale(self) -> None:
        self.folder.remove_partial()
        for split, files in self._files.items():
            (self.folder / split).remove_partial()
            kept = {file.name for file in files}
            for name in (self.folder / split).names():
                if name.startswith("part-") and f"{split}/{name}" not in kept:
                    self.folder.remove(f"{split}/{name}")


def read_manifest(url: str | Folder) -> Manifest:
    """The manifest of a folder of shards.

    Raises DataError if it is missing, malformed, or of another format version.
    """
    folder = Folder.at(url)
    where = folder.url_of(MANIFEST)
    if not folder.exists(MANIFEST):
        raise DataError(where, "no finished shards here", "Run `prepare` into this folder first")
    fix = "Run `prepare` again into a fresh folder"
    content = folder.read_bytes(MANIFEST)
    try:
        version = documents.from_json(content)["format"]
    except (ValueError, TypeError, KeyError):
        raise DataError(where, "not a manifest of shards", fix) from None
    if version != FORMAT:
        raise DataError(where, f"format version {version!r}; this code reads {FORMAT}", fix)
    manifest: Manifest = documents.parse(content, Manifest, where, fix)
    return manifest


def check_files(folder: Folder, manifest: Manifest, split: str) -> list[list[int]]:
    """Check a split's files by their sizes and footers, which is fast.

    Returns for every file the number of rows of each row group. Raises DataError for the first
    file that is missing, unreadable, or not of the size, rows and columns of the manifest.
    """

    def check(file: Shard) -> list[int]:
        where = folder.url_of(file.name)
        size = folder.size(file.name)
        if size != file.bytes:
            raise _corrupt(where, f"{size} bytes where the manifest has {file.bytes}")
        with _opened(folder, file.name) as parquet:
            footer = parquet.metadata
            if footer.num_rows != file.rows:
                raise _corrupt(where, f"{footer.num_rows} rows where the manifest has {file.rows}")
            column = parquet.schema_arrow.field(0)
            wanted = _column_type(manifest)
            if column.name != "tokens" or column.type != wanted:
                raise _corrupt(where, f"column {column.name}: {column.type}, not tokens: {wanted}")
            groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
            for index, group in enumerate(groups):
                _require_small(group, manifest, f"{where} row group {index}")
            return [group.num_rows for group in groups]

    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        return list(pool.map(check, manifest.files(split)))


def read_group(folder: Folder, manifest: Manifest, name: str, index: int) -> np.ndarray:
    """One row group as [N, L] ids in the dtype at rest; DataError if an id is V or more."""
    where = f"{folder.url_of(name)} row group {index}"
    with _opened(folder, name, where) as parquet:
        _require_small(parquet.metadata.row_group(index), manifest, where)
        column = parquet.read_row_group(index, columns=["tokens"], use_threads=False)["tokens"]
        lists = column.combine_chunks()
        if lists.null_count or lists.values.null_count:
            raise _corrupt(where, "ids are missing")
        rows_NL = lists.flatten().to_numpy().reshape(-1, manifest.length)
    _check_ids(rows_NL, manifest.vocabulary.size, lambda row: f"{where} row {row}")
    return rows_NL


@contextmanager
def _opened(folder: Folder, name: str, where: str = "") -> Iterator[pq.ParquetFile]:
    """A parquet file to read; every error of it becomes one DataError about `where`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = where or folder.url_of(name)
    filesystem = folder.arrow_filesystem()
    path = f"{folder.path.rstrip('/')}/{name}"
    with explained(where):
        try:
            with pq.ParquetFile(
                path, filesystem=filesystem, page_checksum_verification=True
            ) as parquet:
                yield parquet
        except (pa.ArrowException, OSError) as error:
            # Arrow reports both torn pages and failures of S3 as an OSError without errno.
            if getattr(error, "errno", None) is not None or "AWS Error" in str(error):
                raise
            reason = scrub(str(error)).splitlines()[0]
            raise _corrupt(where, f"not readable as parquet ({reason})") from None


def _require_small(group: pq.RowGroupMetaData, manifest: Manifest, where: str) -> None:
    """DataError for a row group that would be larger in memory than any that we write."""
    ids = group.num_rows * manifest.length
    most = 2 * 4 * ids + (1 << 16)  # 32 bits an id in parquet, whatever it is at rest
    if group.num_rows > ROWS_PER_GROUP or group.total_byte_size > most:
        raise _corrupt(where, f"{group.num_rows:,} rows of {group.total_byte_size:,} bytes")


def _column_type(manifest: Manifest) -> pa.DataType:
    import pyarrow as pa

    # Without nulls there are no levels to decode, which reads a third faster.
    element = pa.field("element", pa.type_for_alias(manifest.dtype), nullable=False)
    return pa.list_(element, manifest.length)


def _table(rows_NL: np.ndarray, manifest: Manifest) -> pa.Table:
    import pyarrow as pa

    column = _column_type(manifest)
    ids = pa.array(rows_NL.reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(ids, type=column)
    schema = pa.schema([pa.field("tokens", column, nullable=False)])
    return pa.Table.from_arrays([lists], schema=schema)


def _check_ids(rows_NL: np.ndarray, size: int, where: Callable[[int], str]) -> None:
    if rows_NL.size and (rows_NL.max() >= size or rows_NL.min() < 0):
        row = int(((rows_NL >= size) | (rows_NL < 0)).any(axis=1).argmax())
        bad = next(int(id) for id in rows_NL[row] if not 0 <= id < size)
        fix = "Run `prepare` again with the vocabulary that the model uses"
        raise DataError(where(row), f"id {bad} where the vocabulary has {size} entries", fix)


def _corrupt(where: str, why: str) -> DataError:
    return DataError(where, why, "Fetch the file again, or run `prepare` again")
