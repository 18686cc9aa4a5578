"""Text, prompts, manifests and shards, damaged: the very same rows or texts, or one message."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from infra.mixture import read
from infra.shards import MANIFEST, ShardWriter, VocabularyRecord, read_manifest
from infra.storage import Folder
from infra.stream import Plan, StreamConfig
from pipelines import prompts
from pipelines.corpus import pieces
from tests.fuzz import mutate
from tests.fuzz.judge import judge
from tests.fuzz.mutate import seeds
from tests.infra.common import alone, rows_of

ROWS_NL = np.random.default_rng(0).integers(0, 50, (40, 8))
ORDER = StreamConfig(num_lanes=2, rows_per_microbatch=4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    with ShardWriter(
        str(folder), vocabulary=VocabularyRecord(kind="bpe", sha256="ab" * 32, size=50), length=8,
        source="here", split_rule="by hand", blocks="eos",
    ) as writer:  # fmt: skip
        writer.write("train", ROWS_NL[:32])
        writer.write("validation", ROWS_NL[32:])
    return folder


def rows(folder: Path) -> np.ndarray:
    """Every training row, once what a run looks at before it starts has been looked at."""
    manifest, place = read_manifest(str(folder)), Folder.at(str(folder))
    next(read(alone(Plan.of(place, manifest, "train", ORDER)), (0, 1), 0))
    return rows_of(place, manifest, "train")


def require_rows(folder: Path, *names: str) -> None:
    rows_NL = judge(lambda: rows(folder), *names)
    assert rows_NL is None or np.array_equal(rows_NL, ROWS_NL[:32])


@seeds(180)
def test_a_manifest(prepared: Path, tmp_path: Path, seed: str) -> None:
    folder = mutate.damaged(prepared, tmp_path, seed, MANIFEST, mutate.json_)
    require_rows(folder, MANIFEST, "part-00000.parquet", "split", str(folder))


@seeds(150)
def test_a_shard(prepared: Path, tmp_path: Path, seed: str) -> None:
    folder = mutate.copy_of(prepared, tmp_path / "data")
    file = folder / "train" / "part-00000.parquet"
    rng = Random(f"shard {seed}")
    mutate.spoil(rng, file)
    if file.is_file() and file.stat().st_size and rng.random() < 0.8:
        agree(folder, file.stat().st_size)
    require_rows(folder, "part-00000.parquet")


def agree(folder: Path, size: int) -> None:
    """Have the manifest say the size of the damaged file: what is in it must be noticed, too."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["splits"]["train"][0]["bytes"] = size
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest))


TEXTS = [f"the text of document {n}, which is not long" for n in range(60)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": TEXTS}), sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


SOURCES = {
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(LINES),
    "a.parquet": parquet(),
}


def texts(file: Path) -> list[str]:
    return [piece.text for piece in pieces(str(file), "text")]


@seeds(120)
def test_a_compressed_corpus(tmp_path: Path, seed: str) -> None:
    """Whatever is compressed carries checksums, so nothing but the very same texts may come out,
    or none from an empty file; but a Parquet footer has none, and may claim fewer rows."""
    rng = Random(f"corpus {seed}")
    name = rng.choice(sorted(SOURCES))
    (tmp_path / name).write_bytes(SOURCES[name])
    mutate.spoil(rng, tmp_path / name)
    found = judge(lambda: texts(tmp_path / name), name) or []
    assert found == TEXTS[: len(found)]
    assert name.endswith(".parquet") or found in ([], TEXTS)


@seeds(60)
def test_a_plain_corpus(tmp_path: Path, seed: str) -> None:
    """Another text is another corpus; what is not JSON, or not text, is none."""
    rng = Random(f"plain {seed}")
    file = tmp_path / rng.choice(("a.jsonl", "a.txt"))
    file.write_bytes(LINES)
    mutate.spoil(rng, file)
    for text in judge(lambda: texts(file), file.name) or []:
        text.encode()


@seeds(60)
def test_prompts(tmp_path: Path, seed: str) -> None:
    rng = Random(f"prompts {seed}")
    file = tmp_path / rng.choice(("a.jsonl", "a.txt"))
    file.write_bytes(LINES[:2000])
    mutate.spoil(rng, file)
    for where, text in judge(lambda: prompts.read(str(file)), file.name) or []:
        assert file.name in where
        text.encode()
