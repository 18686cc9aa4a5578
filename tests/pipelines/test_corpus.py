"""Reading text: every container and compression, and cuts that no tokenizer notices."""

from __future__ import annotations

import gzip
import json
import lzma
import socket
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dsl.vocabulary import Vocabulary
from infra.errors import DataError, InfraError
from pipelines import corpus
from pipelines.corpus import PIECE, Piece, embedded, pieces

# What upsets readers: line ends of every kind, blanks at the ends, letters of 1 to 4 bytes, quotes.
DOCUMENTS = [
    "One line.",
    "Two lines\nof text, the second unfinished",
    "\r\n Windows,\rold Macs,\u2028paragraph\x85marks\t\n",
    "naïve Ωmega 漢字 🙂 e\u0301",
    '{"text": "a quoted document"}',
    "long " * (3 * PIECE),
]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def joined(found: list[Piece]) -> list[str]:
    """The documents that the pieces make up; every one must be ended by its last piece."""
    texts, parts = [], []
    for piece in found:
        parts.append(piece.text)
        if piece.ends:
            texts.append("".join(parts))
            parts = []
    assert not parts
    return texts


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 7, field: text}) + "\n" for text in texts).encode()


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"id": range(len(texts)), "text": texts})
    pq.write_table(table, sink, row_group_size=2, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def twice(name: str) -> bytes:
    """Two columns of one name."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, [name] * 2), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", "", ".jsonl", ".ndjson", ".json"])
def test_every_container_and_compression(tmp_path: Path, suffix: str, compression: str) -> None:
    lines = suffix in (".jsonl", ".ndjson", ".json")
    texts = DOCUMENTS if lines else DOCUMENTS[2:3]
    file = tmp_path / f"corpus{suffix}{compression}"
    file.write_bytes(COMPRESS[compression](jsonl(texts) if lines else texts[0].encode()))
    assert joined(list(pieces(str(file), "text"))) == texts


def test_parquet_across_row_groups(tmp_path: Path) -> None:
    (tmp_path / "corpus.parquet").write_bytes(parquet(DOCUMENTS))
    assert joined(list(pieces(str(tmp_path / "corpus.parquet"), "text"))) == DOCUMENTS


def test_a_pattern_reads_its_files_in_order_of_name() -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/test_corpus/b.txt", b"second")
    files.pipe("/test_corpus/a.jsonl.gz", gzip.compress(jsonl(["first", "of two"], "body")))
    files.pipe("/test_corpus/c.parquet", parquet(["not", "these"]))
    files.pipe("/test_corpus/deeper/d.txt", b"nor this")
    found = joined(list(pieces("memory://test_corpus/[ab]*", "body")))
    assert found == ["first", "of two", "second"]
    assert joined(list(pieces("memory://test_corpus/c.parquet", "text"))) == ["not", "these"]


def test_empty_documents_and_blank_lines_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([""]) + b"\n \n" + jsonl(["text"]))
    (tmp_path / "b.txt").write_bytes(b"")
    assert list(pieces(f"{tmp_path}/*", "text")) == [Piece("text", ends=True)]


def test_the_embedded_text_is_english_and_repeats_nothing() -> None:
    texts = list(embedded())
    assert texts == list(embedded())
    assert 300_000 < sum(map(len, texts)) < 600_000
    paragraphs = [" ".join(p.split()) for text in texts for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert joined(list(pieces("cpython", "text"))) == texts


def ids(vocabulary: Vocabulary, texts: list[str]) -> list[int]:
    return list(chain.from_iterable(vocabulary.encode(texts)))


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
spaces = st.sampled_from([" ", " ", " ", "  ", "\n", " \n", "\t", "\u3000", "\x1c", "'s ", ""])
texts = st.lists(st.tuples(words, spaces), min_size=20, max_size=120).map(
    lambda pairs: "".join(word + space for word, space in pairs)
)


@pytest.fixture(scope="module")
def bpe() -> Vocabulary:
    return Vocabulary.train_bpe(embedded(), 2000)


@settings(max_examples=100)
@given(text=texts, data=st.data())
def test_no_token_crosses_a_seam(bpe: Vocabulary, text: str, data: st.DataObject) -> None:
    """A byte-level BPE gives the parts of a text the ids that it gives the whole."""
    seams = [match.start() for match in corpus.SEAM.finditer(text)]
    at = sorted(data.draw(st.sets(st.sampled_from(seams)))) if seams else []
    parts = [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]
    assert ids(bpe, parts) == ids(bpe, [text])


@settings(max_examples=60)
@given(text=texts, size=st.integers(2, 40), chunk=st.integers(1, 50))
def test_pieces_make_up_the_document(text: str, size: int, chunk: int) -> None:
    """Whatever chunks it arrives in; one piece holds at most two sizes, and only the last ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", size)
        chunks = (text[i : i + chunk] for i in range(0, len(text), chunk))
        found = list(corpus._cut(chunks))
    assert "".join(piece.text for piece in found) == text
    assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
    assert all(0 < len(piece.text) <= 2 * size for piece in found)
    assert all(len(piece.text) >= size for piece in found[:-1])


def test_a_long_text_is_tokenized_as_a_whole(bpe: Vocabulary, tmp_path: Path) -> None:
    text = "\n\n".join(embedded())
    (tmp_path / "topics.txt").write_text(text)
    found = list(pieces(str(tmp_path / "topics.txt"), "text"))
    assert len(found) > 40
    assert ids(bpe, [piece.text for piece in found]) == ids(bpe, [text])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00\x01" * 9, r"a.txt: not UTF-8 text \(byte 0xff\). Give text"),
        ("a.txt", b"text, then\0NUL", "holds NUL bytes: this is not text"),
        ("a.txt.gz", b"not compressed at all", "a.txt.gz: cannot be read"),
        ("a.txt.zst", b"not compressed at all", "a.txt.zst: cannot be read"),
        *((f"a.txt{end}", b"", f"a.txt{end}: 0 bytes are no comp") for end in (".gz", ".zst")),
        ("a.jsonl", jsonl(["fine"]) + b'{"text": "torn', "a.jsonl line 2: not JSON"),
        ("a.jsonl", jsonl(["fine"], "body"), r"a.jsonl line 1: no text in field 'text' \(it has: "),
        ("a.jsonl", b'["text"]\n', "a.jsonl line 1: no text in field 'text'"),
        ("a.jsonl", b'{"text": null}\n', "a.jsonl line 1: no text in field 'text'"),
        ("a.jsonl", b'{"text": null}\n', r"\(it holds NoneType\). Drop the document, or "),
        ("a.parquet", parquet([b"a"]), r"row 0: no text in field 'text' \(it holds bytes\)"),
        ("a.jsonl", b'{"text": "a \\ud800 b"}\n', "a.jsonl line 1: holds half of a surrogate pair"),
        ("a.parquet", parquet(["text"] * 9)[:-20], "a.parquet: not a whole Parquet file"),
        (
            "a.parquet",
            twice("text"),
            r"no single column 'text'; it has text, text\. Set text_field",
        ),
        ("a.parquet", b"PAR1 and nothing else PAR1", "a.parquet: not a whole Parquet file"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(pieces(str(tmp_path / name), "text"))


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_half_a_file_is_not_a_shorter_corpus(tmp_path: Path, compression: str) -> None:
    whole = COMPRESS[compression](b"".join(b"%d " % i for i in range(99_999)))
    (tmp_path / f"a.txt{compression}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"a.txt{compression}: cannot be read"):
        list(pieces(str(tmp_path / f"a.txt{compression}"), "text"))


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_file_of_many_frames_is_read_to_its_end(tmp_path: Path, compression: str) -> None:
    frames = [COMPRESS[compression](part.encode() * 9_999) for part in ("one ", "two ", "three ")]
    (tmp_path / f"a.txt{compression}").write_bytes(b"".join(frames))
    (text,) = joined(list(pieces(str(tmp_path / f"a.txt{compression}"), "text")))
    assert text == "one " * 9_999 + "two " * 9_999 + "three " * 9_999


def test_damage_in_the_middle_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    content = bytearray(parquet([str(i) * 300 for i in range(9)]))
    content[200:400] = bytes(200)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(pieces(str(tmp_path / "a.parquet"), "text"))


@pytest.mark.parametrize("source", ["nothing.txt", "no*thing", ".", "memory://nowhere/*.txt"])
def test_a_source_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        list(pieces(source, "text"))


@pytest.mark.parametrize("source", ["zip://*.txt::a.zip", "simplecache::memory://a.txt"])
def test_a_chain_of_file_systems_is_refused(source: str) -> None:
    with pytest.raises(DataError, match=r"are not read\. Unpack or copy them first"):
        list(pieces(source, "text"))


def test_a_server_that_does_not_answer_is_not_a_missing_file() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # a port on which nothing listens
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.txt"
        with pytest.raises(InfraError, match=r"/a\.txt: the store does not answer"):
            list(pieces(url, "text"))


@pytest.mark.parametrize("value", [["a", "b"], {"a": "b"}])
def test_a_column_of_more_than_texts_is_named(tmp_path: Path, value: object) -> None:
    pq.write_table(pa.table({"id": [1], "text": [value]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: column 'text' holds \w+<.*>, not text"):
        list(pieces(str(tmp_path / "a.parquet"), "text"))


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_the_mark_of_windows_is_no_text(tmp_path: Path, suffix: str, compression: str) -> None:
    content = jsonl(["text"]) if suffix == ".jsonl" else b"text"
    file = tmp_path / f"corpus{suffix}{compression}"
    file.write_bytes(COMPRESS[compression](b"\xef\xbb\xbf" + content))
    assert joined(list(pieces(str(file), "text"))) == ["text"]


def test_a_column_of_another_name_is_offered(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(["text"]))
    with pytest.raises(DataError, match=r"no column 'body'; it has id, text. Set text_field=…"):
        list(pieces(str(tmp_path / "a.parquet"), "body"))


def test_real_web_text(test_data: Path, tmp_path: Path) -> None:
    """OpenWebText's documents by GPT-2's BPE: whole and in pieces, the same ids."""
    gpt2 = Vocabulary.load(test_data / "gpt2")
    with lzma.open(test_data / "owt" / "owt_docs.jsonl.xz", "rt", encoding="utf-8") as file:
        lines = list(islice(file, 100))
    (tmp_path / "owt.jsonl").write_text("".join(lines))
    found = list(pieces(str(tmp_path / "owt.jsonl"), "text"))
    documents = [json.loads(line)["text"] for line in lines]
    assert joined(found) == documents
    assert len(found) > len(documents)
    assert ids(gpt2, [piece.text for piece in found]) == ids(gpt2, documents)
