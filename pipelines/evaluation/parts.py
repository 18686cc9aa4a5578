"""What an evaluation has measured so far: Parquet files in its run directory.

A part appears whole or not at all, and its name says what is in it. The parts are all the state
that an evaluation has: after a kill, the missing ones are made.
"""

from __future__ import annotations

import io
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dsl.vocabulary import Vocabulary
from infra.errors import DataError
from infra.storage import Folder

SUFFIX = ".parquet"
PART = re.compile(r"\d{8,}\.parquet", re.ASCII)
NOTES = b"evaluation"  # the key of a file's notes in its schema
READERS = 8


@dataclass(frozen=True)
class Parts:
    """The parts below a folder. A part's place is a group and its number in it: the first row."""

    folder: Folder

    def write(self, group: str, first: int, table: pa.Table, notes: Mapping[str, Any]) -> None:
        """Keep a table, with what else is to be known of how it was made."""
        table = table.replace_schema_metadata({NOTES: json.dumps(notes).encode()})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        (self.folder / group).write_bytes(f"{first:08d}{SUFFIX}", buffer.getvalue())

    def present(self, group: str) -> set[int]:
        """The numbers of the parts of a group that are there."""
        names = (self.folder / group).names()
        return {int(name.removesuffix(SUFFIX)) for name in names if PART.fullmatch(name)}

    def missing(self, group: str, rows: int, size: int) -> list[tuple[int, int]]:
        """The parts that a group of so many rows lacks, as `chunks` has them."""
        there = self.present(group)
        return [(first, count) for first, count in chunks(rows, size) if first not in there]

    def read(self, group: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All parts of a group as one table, in the order of their numbers."""
        return _joined(self._each(group, sorted(self.present(group)), columns))

    def rows(self, group: str, first: int, count: int, columns: Sequence[str]) -> pa.Table:
        """``count`` rows of a group from ``first`` on, fewer where it ends before, out of the parts
        that hold them."""
        starts = sorted(self.present(group))
        begin, end = bisect_right(starts, first) - 1, bisect_left(starts, first + count)
        table = _joined(self._each(group, starts[begin:end], columns))
        return table.slice(first - starts[begin], count)

    def notes(self, group: str) -> list[dict[str, Any]]:
        """What is to be known of each part of a group."""
        tables = self._each(group, sorted(self.present(group)), [])
        return [json.loads(table.schema.metadata[NOTES]) for table in tables]

    def _each(
        self, group: str, starts: Sequence[int], columns: Sequence[str] | None
    ) -> list[pa.Table]:
        with ThreadPoolExecutor(READERS) as pool:
            read = partial(self.one, group, columns=columns)
            return list(pool.map(read, starts))

    def one(self, group: str, first: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A single part; DataError for a file that is none."""
        name = f"{group}/{first:08d}{SUFFIX}"
        content = io.BytesIO(self.folder.read_bytes(name))
        try:
            file = pq.ParquetFile(content, page_checksum_verification=True)
            if missing := set(columns or ()) - set(file.schema_arrow.names):
                raise ValueError(f"no column {min(missing)}")
            table = file.read(None if columns is None else list(columns))
            json.loads(table.schema.metadata[NOTES])
        # Arrow reports torn pages as an OSError; without notes there are no metadata at all.
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            where, why = self.folder.url_of(name), f"not a part of an evaluation ({error})"
            raise DataError(where, why, "Remove it; the same command makes it again") from None
        return table


def _joined(tables: Iterable[pa.Table]) -> pa.Table:
    """Tables one below the other."""
    bare = [table.replace_schema_metadata() for table in tables]
    # A column that is null throughout a part may have been kept there without a type.
    return pa.concat_tables(bare, promote_options="default")


def matrix(column: pa.ChunkedArray, dtype: Any) -> np.ndarray:
    """A column of equally long lists, ``[N, K]``."""
    lists = column.combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), -1).astype(dtype)


def lists(rows_NK: np.ndarray) -> pa.Array:
    """The rows of a matrix as a column of lists."""
    width = rows_NK.shape[1]
    return pa.FixedSizeListArray.from_arrays(pa.array(rows_NK.reshape(-1)), width)


def texts(tokens_BL: np.ndarray, first: int, vocabulary: Vocabulary) -> pa.Table:
    """Texts as they are kept: their numbers from ``first`` on, their tokens, and what they say."""
    words = [vocabulary.decode(row) for row in tokens_BL.tolist()]
    numbers = np.arange(first, first + len(tokens_BL))
    return pa.table({"row": numbers, "text": words, "tokens": lists(tokens_BL)})


def chunks(rows: int, size: int) -> Iterable[tuple[int, int]]:
    """Rows in chunks of (first row, number of rows), the last of which may be smaller."""
    return ((first, min(size, rows - first)) for first in range(0, rows, size))
