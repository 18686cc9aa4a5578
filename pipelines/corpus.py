"""A corpus as a stream of pieces, from text, JSON lines or Parquet, plain or compressed.

A document is one text file, one JSON line or one Parquet row. It is cut into pieces of at most
2 `PIECE` characters. The cuts do not change the tokens of a tokenizer that splits words at spaces,
except in a text without spaces. Memory holds one piece of a text file at a time.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import fsspec

from infra.credentials import scrub
from infra.errors import DataError
from infra.storage import Folder, explained

if TYPE_CHECKING:
    import pyarrow.parquet as pq

EMBEDDED = "cpython"
PIECE = 1 << 12
LONGEST = 1 << 26  # characters of a document that is one line
# The largest ratio of a text to its compressed size, for texts above FLOOR. Prose has about 5;
# archives that are made to fill memory or disk have thousands.
EXPANSION, FLOOR = 250, 1 << 26
UTF_8 = "utf-8-sig"  # with or without the mark that editors of Windows put in front
JSON_LINES = (".jsonl", ".ndjson", ".json")  # the last as in C4
COMPRESSED = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
# A single space between two words: a cut in front of it does not change the tokens of the words.
SEAM = re.compile(r"(?<=\S)(?= \S)")
DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class Piece:
    """`ends` says that the document ends with this piece."""

    text: str
    ends: bool


def pieces(source: str, field: str) -> Iterator[Piece]:
    """The pieces of a corpus, in order.

    source: `cpython` for the reference text inside this Python, or an fsspec URL, `*` allowed.
        The suffix before the compression's says what is in a file: `.jsonl`, `.ndjson` and
        `.json` mean JSON lines, `.parquet` is Parquet, anything else is text.
    field: of a JSON line or a Parquet row, the one that holds the text.

    Raises DataError, with file and place, for what is missing, damaged, empty or not text.
    """
    if source == EMBEDDED:
        for document in embedded():
            yield from _cut(_chunks(document))
        return
    for url in expand(source):
        with _explained(url):
            most, found = _most(url), 0
            for piece in READERS.get(_suffix(url), _read_text)(url, field):
                found += len(piece.text)
                _require_text(found, most, url)
                yield piece


def embedded() -> Iterator[str]:
    """The English reference text that comes with CPython: about 370 kB without repetitions.

    Topics quote each other, so only the first of equal paragraphs is kept. The topics are in a
    random but fixed order, so that all parts of the corpus are alike.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest()):
        fresh = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                fresh.append(paragraph)
        if fresh:
            yield "\n\n".join(fresh)


def expand(source: str) -> list[str]:
    """The files that a URL names, sorted; DataError where there is none."""
    if "::" in source:
        why = "files inside an archive, or behind a chain of file systems, are not read"
        raise DataError(scrub(source), why, "Unpack or copy them first")
    Folder.at(source)  # refuses credentials and unknown protocols
    with _explained(source):
        files = fsspec.open_files(source, mode="rb")
        filesystem = files.fs
        urls = sorted(
            filesystem.unstrip_protocol(file.path)
            for file in files
            if filesystem.info(file.path)["type"] == "file"  # isfile() hides errors
        )
    if not urls:
        raise DataError(scrub(source), "no such file", "Give a file, or a pattern with *")
    return urls


def _suffix(url: str) -> str:
    name = url.rpartition("/")[2]
    for compression in COMPRESSED:
        name = name.removesuffix(compression)
    return name[name.rfind(".") :] if "." in name else ""


def _most(url: str) -> float:
    """The most characters that a file may hold."""
    folder, name = Folder.holding(url)
    size = folder.size(name)
    if size == 0 and url.endswith(tuple(COMPRESSED)):  # which some decoders take for no text
        raise DataError(url, "0 bytes are no compressed file", "Copy it again")
    return max(EXPANSION * (size or math.inf), FLOOR)


def _require_text(characters: int, most: float, url: str) -> None:
    if characters > most:
        why = f"unpacks to more than {EXPANSION} times its size, as no text does"
        raise DataError(url, why, "Unpack it and look at what it is")


@contextmanager
def _open(url: str) -> Iterator[TextIO]:
    compression = next((name for end, name in COMPRESSED.items() if url.endswith(end)), None)
    if compression != "zstd":
        with fsspec.open(url, "rt", encoding=UTF_8, newline="", compression=compression) as file:
            yield file
        return
    import pyarrow as pa

    with fsspec.open(url, "rb") as file:  # fsspec's own decompressor does not notice a torn file
        whole = pa.CompressedInputStream(file, "zstd")
        yield io.TextIOWrapper(whole, encoding=UTF_8, newline="")


def _read_text(url: str, field: str) -> Iterator[Piece]:
    with _open(url) as file:
        yield from _cut(iter(lambda: _checked(file, url), ""))


def _checked(file: TextIO, url: str) -> str:
    text = file.read(PIECE)
    if "\0" in text:
        raise DataError(url, "holds NUL bytes: this is not text", "Give text, .jsonl or .parquet")
    return text


def _read_jsonl(url: str, field: str) -> Iterator[Piece]:
    with _open(url) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), ""), 1):
            if len(line) == LONGEST:
                raise DataError(f"{url} line {number}", f"longer than {LONGEST:,} characters")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                where, fix = f"{url} line {number}", "Give one JSON object a line"
                raise DataError(where, f"not JSON ({error})", fix) from None
            yield from _cut(_chunks(_field(row, field, f"{url} line {number}")))


def _read_parquet(url: str, field: str) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fsspec.open(url, "rb") as file:
        try:
            schema = pq.ParquetFile(file).schema_arrow
            if schema.names.count(field) != 1:
                which = "no single" if field in schema.names else "no"
                why = f"{which} column {field!r}; it has {', '.join(schema.names)}"
                raise DataError(url, why, "Set text_field=…")
            if pa.types.is_nested(held := schema.field(field).type):
                raise DataError(url, f"column {field!r} holds {held}, not text", "Set text_field=…")
            # As a dictionary, repetitions of a text take no memory.
            table = pq.ParquetFile(file, page_checksum_verification=True, read_dictionary=[field])
            _require_text(_claimed(table.metadata, field), _most(url), url)
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0):
                    document = {field: text.as_py()}
                    yield from _cut(_chunks(_field(document, field, f"{url} row {row}")))
                    row += 1
        except pa.ArrowException as error:
            why = f"not a whole Parquet file ({str(error).splitlines()[0]})"
            raise DataError(url, why, "Copy it again") from None


READERS: dict[str, Callable[[str, str], Iterator[Piece]]] = {
    **dict.fromkeys(JSON_LINES, _read_jsonl),
    ".parquet": _read_parquet,
}


def _field(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        if isinstance(row, dict) and field in row:
            why = f"no text in field {field!r} (it holds {type(text).__name__})"
            raise DataError(where, why, "Drop the document, or set text_field=…")
        held = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(where, f"no text in field {field!r} (it has: {held})", "Set text_field=…")
    try:
        text.encode()
    except UnicodeEncodeError:
        why = "holds half of a surrogate pair: not Unicode"
        raise DataError(where, why, "Drop the document") from None
    return text


def _claimed(footer: pq.FileMetaData, field: str) -> int:
    """Unpacked bytes of a Parquet column, according to the footer."""
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    columns = [group.column(at) for group in groups for at in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == field)


def _chunks(text: str) -> Iterator[str]:
    return (text[at : at + PIECE] for at in range(0, len(text), PIECE))


def _cut(chunks: Iterator[str]) -> Iterator[Piece]:
    """The pieces of one document that arrives in chunks; none for an empty one."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) > 2 * PIECE:
            seam = SEAM.search(rest, PIECE)
            at = min(seam.start() if seam else 2 * PIECE, 2 * PIECE)
            yield Piece(rest[:at], ends=False)
            rest = rest[at:]
    if rest:
        yield Piece(rest, ends=True)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn the errors of reading a file into one Problem that names the file."""
    where = scrub(url)
    with explained(where):
        try:
            yield
        except UnicodeDecodeError as error:
            why = f"not UTF-8 text (byte 0x{error.object[error.start]:02x})"
            raise DataError(where, why, "Give text, .jsonl or .parquet") from None
        except FileNotFoundError as error:
            if error.__cause__:  # e.g. a server that does not answer: `explained` knows
                raise
            raise DataError(where, "no such file", "Check the URL") from None
        except (OSError, *DAMAGED) as error:
            # Decoders raise OSError itself without a number; disks and networks do not.
            if not isinstance(error, DAMAGED) and (type(error) is not OSError or error.errno):
                raise
            raise DataError(where, f"cannot be read ({error})", "Copy it again") from None
        except (ValueError, ImportError) as error:
            raise DataError(where, str(error)) from None
