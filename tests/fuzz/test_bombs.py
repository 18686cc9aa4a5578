"""Tiny files that claim gigabytes, or unpack to them: refused before memory has grown."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from infra.shards import MANIFEST, ShardWriter, VocabularyRecord
from tests.dsl.test_mdlm import training_file

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
MOST = 700  # MiB that a refusal may take; every bomb holds, or claims, more than 1,000

PACKERS = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor().compress,
}


def texts(folder: Path) -> None:
    """4 GiB of words, and one line of JSON that does not end: each packed MiB over and over."""
    for suffix, pack in PACKERS.items():
        whole = pack(b"spam and " * (MIB // 9))
        (folder / f"corpus-words.txt.{suffix}").write_bytes(whole * 4096)
        line = pack(b'{"text": "') + pack(b"x" * MIB) * 4096
        (folder / f"corpus-line.jsonl.{suffix}").write_bytes(line)
    with zipfile.ZipFile(folder / "corpus-archive.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../outside.txt", b"spam " * MIB)


def parquet(folder: Path) -> None:
    """One text of 32 MiB that 10,000 rows repeat, and 4 GiB of rows in one page run."""
    large = pa.array(["spam" * (8 * MIB)])
    repeated = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10_000, np.int32)), large)
    pq.write_table(
        pa.table({"text": repeated}), folder / "corpus-repeated.parquet",
        compression="zstd", dictionary_pagesize_limit=1 << 30,
    )  # fmt: skip
    schema = pa.schema([("text", pa.string())])
    rows = pa.table({"text": ["spam" * 25_000] * 1_000}, schema=schema)
    with pq.ParquetWriter(
        folder / "corpus-claimed.parquet", schema, compression="zstd", use_dictionary=False
    ) as writer:
        for _ in range(3):
            writer.write_table(rows)


def shards(folder: Path, name: str, rows: int, length: int) -> None:
    """Shards whose manifest is honest about a row group of zeros that no writer of ours makes."""
    place = folder / name
    with ShardWriter(
        str(place), vocabulary=VocabularyRecord(kind="bpe", sha256="ab" * 32, size=50),
        length=length, source="here", split_rule="by hand", blocks="eos",
    ) as writer:  # fmt: skip
        writer.write("train", np.zeros((1, length), np.int64))
    file = place / "train/part-00000.parquet"
    schema = pq.read_schema(file)
    flat = pa.array(np.zeros(rows * length, np.uint16))
    lists = pa.FixedSizeListArray.from_arrays(flat, type=schema.field(0).type)
    pq.write_table(
        pa.Table.from_arrays([lists], schema=schema), file, row_group_size=rows, compression="zstd"
    )
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["splits"]["train"][0] |= {"rows": rows, "bytes": file.stat().st_size}
    (place / MANIFEST).write_text(json.dumps(manifest))


def claims(folder: Path, name: str, **facts: int) -> None:
    shards(folder, name, 8, 8)
    manifest = json.loads((folder / name / MANIFEST).read_text())
    (folder / name / MANIFEST).write_text(json.dumps(manifest | facts))


def checkpoints(folder: Path) -> None:
    """A packed pickle of 1 GiB, and one number that is seen as a trillion."""
    with zipfile.ZipFile(folder / "model-packed.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as entry:
            for _ in range(1024):
                entry.write(bytes(MIB))
        archive.writestr("archive/version", "3")
    held = training_file()
    view = torch.zeros(1).expand(1 << 40)
    held["state_dict"]["backbone.blocks.0.norm1.weight"] = view
    held["ema"]["shadow_params"][list(held["state_dict"]).index(
        "backbone.blocks.0.norm1.weight") - 1] = view  # fmt: skip
    torch.save(held, folder / "model-view.ckpt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    folder = tmp_path_factory.mktemp("bombs")
    texts(folder)
    parquet(folder)
    shards(folder, "shards-rows", 1 << 22, 8)
    shutil.copytree(folder / "shards-rows", folder / "group-rows")
    claims(folder, "shards-length", length=1 << 40)
    claims(folder, "shards-vocabulary", vocabulary={"kind": "bpe", "sha256": "", "size": 1 << 60})
    checkpoints(folder)
    (folder / "peace").mkdir()
    shards(folder / "peace", "shards", 8, 8)
    shards(folder / "peace", "group", 8, 8)
    (folder / "peace/corpus").write_text("words")
    torch.save(training_file(), folder / "peace/model")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.fuzz.bombs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


BOMBS = [
    *(f"corpus-{name}.{suffix}" for suffix in PACKERS for name in ("words.txt", "line.jsonl")),
    "corpus-archive.zip", "corpus-repeated.parquet", "corpus-claimed.parquet",
    "shards-rows", "group-rows", "shards-length", "shards-vocabulary",
    "model-packed.ckpt", "model-view.ckpt",
]  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb(found: dict[str, dict[str, object]], bomb: str) -> None:
    seen = found[bomb]
    assert seen["code"] == 3, seen
    assert bomb in str(seen["message"])
    assert float(str(seen["grown"])) < MOST, seen


def test_every_bomb_went_off(found: dict[str, dict[str, object]]) -> None:
    assert found.keys() == set(BOMBS)
