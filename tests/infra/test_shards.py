from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from infra import shards
from infra.errors import ConfigError, DataError, InfraError
from infra.shards import (
    Manifest,
    Shard,
    ShardWriter,
    VocabularyRecord,
    check_files,
    read_group,
    read_manifest,
)
from infra.storage import Folder
from tests.infra.common import rows_of
from tests.infra.faulty import BUCKET, FaultyStore

L, V = 8, 300


def writer(url: str | Folder, size: int = V, **options: Any) -> ShardWriter:
    vocabulary = VocabularyRecord(kind="char", sha256="c0ffee" * 10, size=size)
    rules = {"source": "a test", "split_rule": "by hand", "blocks": "eos", "commit": "abc"}
    return ShardWriter(url, vocabulary=vocabulary, length=L, **rules, **options)


def ids(rows: int, size: int = V, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, size, (rows, L))


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Folder, Manifest]:
    with writer(str(tmp_path)) as out:
        out.write("train", ids(200))
        out.write("validation", ids(5))
    assert out.manifest
    return out.folder, out.manifest


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_round_trip(tmp_path: Path, size: int, dtype: str) -> None:
    rows_NL = ids(500, size)
    rows_NL[0] = size - 1
    with writer(str(tmp_path), size) as out:
        for part in np.array_split(rows_NL, 7):
            out.write("train", part)
        out.write("test", rows_NL[:3])
        out.extra["bytes"] = {"train": 12345}
    folder = Folder.at(str(tmp_path))
    manifest = read_manifest(folder)
    assert manifest == out.manifest
    assert manifest.extra == {"bytes": {"train": 12345}}
    assert manifest.dtype == dtype == rows_of(folder, manifest, "train").dtype
    np.testing.assert_array_equal(rows_of(folder, manifest, "train"), rows_NL)
    np.testing.assert_array_equal(rows_of(folder, manifest, "test"), rows_NL[:3])
    schema = pq.read_schema(tmp_path / "train/part-00000.parquet")
    assert f"fixed_size_list<element: {dtype} not null>[{L}]" in str(schema.field("tokens"))


def test_files_and_groups_have_their_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROWS_PER_FILE", 256)
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 4)
    with writer(str(tmp_path)) as out:
        out.write("train", ids(600))
        out.write("validation", ids(130))
        out.write("test", ids(3))
        assert out.folder.names() == ["train"]  # what is full is on the disk, the rest waits
        assert sum(map(len, out._waiting["train"])) == 600 % 256
    assert out.manifest
    groups = {split: check_files(out.folder, out.manifest, split) for split in out.manifest.splits}
    assert groups["train"] == [[4] * 64, [4] * 64, [4] * 22]
    assert groups["validation"] == [[2] * 65]
    assert groups["test"] == [[1, 1, 1]]


def test_the_digest_is_of_the_rows(tmp_path: Path) -> None:
    def digest(name: str, seed: int, commit: str) -> str:
        with writer(str(tmp_path / name)) as out:
            out.write("train", ids(50, seed=seed))
            out.extra["commit"] = commit
        assert out.manifest
        return out.manifest.digest

    assert digest("a", 0, "x") == digest("b", 0, "y") != digest("c", 1, "x")


def test_a_failed_writer_never_looks_finished(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), writer(str(tmp_path)) as out:
        out.write("train", ids(10))
        _ = 1 / 0
    with pytest.raises(DataError, match="Run `prepare`"):
        read_manifest(str(tmp_path))


def test_finished_shards_are_not_overwritten_unless_asked(
    finished: tuple[Folder, Manifest],
) -> None:
    folder, manifest = finished
    with pytest.raises(ConfigError, match="finished shards are here"):
        writer(folder)
    assert read_manifest(folder) == manifest
    with writer(folder, overwrite=True) as out:
        with pytest.raises(DataError, match="no finished shards"):
            read_manifest(folder)
        out.write("train", ids(4))
    assert read_manifest(folder).rows("train") == 4
    assert (folder / "validation").names() == []


def test_a_writer_asks_before_each_file_and_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROWS_PER_FILE", 4)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "part-00007.parquet").write_bytes(b"another's")
    there: list[int] = []

    def permit() -> None:
        there.append(len(list(tmp_path.glob("train/*"))))
        if len(there) == 4:
            raise InfraError(str(tmp_path), "was taken over")

    with pytest.raises(InfraError), writer(str(tmp_path), permit=permit) as out:
        out.write("train", ids(10))
    assert there == [1, 2, 3, 4]
    assert not (tmp_path / "manifest.json").exists()


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """Files under other names too, which no list shows."""
    (tmp_path / "train").mkdir()
    for name in ("train/part-00007.parquet", "train/.part-00000.parquet.0a1b2c3d.partial",
                 ".manifest.json.0a1b2c3d.partial"):  # fmt: skip
        (tmp_path / name).write_bytes(b"half")
    with writer(str(tmp_path)) as out:
        out.write("train", ids(4))
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"manifest.json", "train/part-00000.parquet"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.full((3, L), V), f"train row 2: id {V} where the vocabulary has {V} entries"),
        (np.full((1, L), -1), "train row 2: id -1"),
        (np.zeros((1, L + 1), int), "not of 8 integer ids"),
        (np.zeros((1, L)), "float64"),
    ],
)
def test_a_writer_refuses_what_is_not_ids(tmp_path: Path, rows: np.ndarray, message: str) -> None:
    out = writer(str(tmp_path))
    out.write("train", ids(2))
    with pytest.raises(DataError, match=message):
        out.write("train", rows)
    with pytest.raises(ConfigError, match="none of train"):
        out.write("dev", ids(1))


def test_no_rows_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a test: it gave not a single row"), writer(str(tmp_path)):
        pass
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda facts: facts.update(format=2), "format version 2; this code reads 1"),
        (lambda facts: facts.pop("format"), "not a manifest"),
        (lambda facts: facts.pop("length"), "length: Field required"),
        (lambda facts: facts.update(length="8"), "length: Input should be"),
        (lambda facts: facts.update(length=0), "at least one position"),
        (lambda facts: facts.update(lenght=8), "lenght: Unexpected"),
        (lambda facts: facts.update(dtype="uint32"), "needs uint16"),
        (lambda facts: facts["splits"].update(dev=[]), "unknown split 'dev'"),
        (lambda facts: facts["splits"]["train"][0].update(rows=-1), "has no rows"),
        (
            lambda facts: facts["splits"]["train"][0].update(name="../x"),  # and more in tests/fuzz
            "not a plain relative file name",
        ),
    ],
)
def test_a_spoilt_manifest(
    finished: tuple[Folder, Manifest], spoil: Callable[[dict], None], message: str
) -> None:
    folder, _ = finished
    facts = json.loads(folder.read_bytes("manifest.json"))
    spoil(facts)
    folder.write_bytes("manifest.json", json.dumps(facts).encode())
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(folder)
    assert caught.value.where.endswith("manifest.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe\x00binary"])
def test_no_manifest_at_all(finished: tuple[Folder, Manifest], content: bytes) -> None:
    finished[0].write_bytes("manifest.json", content)
    with pytest.raises(DataError, match="not a manifest of shards"):
        read_manifest(finished[0])


def test_a_split_that_is_not_there(finished: tuple[Folder, Manifest]) -> None:
    with pytest.raises(ConfigError, match=r"no 'test'\. It has train, validation"):
        finished[1].files("test")
    with pytest.raises(ConfigError, match="Did you mean validation"):
        finished[1].files("valid")


def test_missing_and_truncated_files(finished: tuple[Folder, Manifest]) -> None:
    folder, manifest = finished
    (file,) = manifest.files("train")
    content = folder.read_bytes(file.name)
    folder.write_bytes(file.name, content[:-10])
    with pytest.raises(DataError, match=rf"{file.name}: {file.bytes - 10} bytes where"):
        check_files(folder, manifest, "train")
    folder.write_bytes(file.name, content[:-10] + b"0123456789")
    with pytest.raises(DataError, match=rf"{file.name}: not readable as parquet"):
        check_files(folder, manifest, "train")
    folder.remove(file.name)
    with pytest.raises(DataError, match=rf"{file.name}: not found"):
        check_files(folder, manifest, "train")
    check_files(folder, manifest, "validation")


def test_another_file_under_the_name(finished: tuple[Folder, Manifest]) -> None:
    folder, manifest = finished
    (validation,) = manifest.files("validation")

    def claim(**facts: object) -> Manifest:
        spoilt = Shard(**{**vars(validation), **facts})
        return Manifest(**{**vars(manifest), "splits": {"validation": (spoilt,)}})

    with pytest.raises(DataError, match="5 rows where the manifest has 6"):
        check_files(folder, claim(rows=6), "validation")
    longer = Manifest(**{**vars(manifest), "length": L + 1})
    with pytest.raises(DataError, match=r"\[8\], not tokens"):
        check_files(folder, longer, "train")


def test_a_flipped_bit_is_seen_while_reading(tmp_path: Path) -> None:
    with writer(str(tmp_path), 1 << 16) as out:  # any bits are ids, and too random to compress
        out.write("train", ids(200, 1 << 16))
    folder, manifest = out.folder, read_manifest(out.folder)
    name = manifest.files("train")[0].name
    chunk = pq.read_metadata(tmp_path / name).row_group(2).column(0)
    content = bytearray(folder.read_bytes(name))
    content[chunk.data_page_offset + chunk.total_compressed_size - 9] ^= 1
    folder.write_bytes(name, bytes(content))
    check_files(folder, manifest, "train")
    read_group(folder, manifest, name, 1)
    with pytest.raises(DataError, match=rf"{name} row group 2: not readable as parquet \(.*CRC"):
        read_group(folder, manifest, name, 2)


def test_an_id_out_of_range_is_named_by_its_row(finished: tuple[Folder, Manifest]) -> None:
    folder, manifest = finished
    small = Manifest(
        **{**vars(manifest), "vocabulary": VocabularyRecord(kind="char", sha256="", size=290)}
    )
    name = manifest.files("train")[0].name
    rows_NL = rows_of(folder, manifest, "train")
    row = int((rows_NL >= 290).any(axis=1).argmax())
    group, within = divmod(row, 200 // 64)
    with pytest.raises(DataError, match=rf"{name} row group {group} row {within}: id 29\d where"):
        rows_of(folder, small, "train")


@pytest.fixture
def bucket() -> Iterator[str]:
    with FaultyStore():
        yield f"s3://{BUCKET}/some/where"


def test_s3(bucket: str) -> None:
    folder = Folder.at(bucket)
    assert folder.url == bucket
    assert folder.names() == []
    rows_NL = ids(300)
    with writer(bucket) as out:
        out.write("train", rows_NL)
    manifest = read_manifest(bucket)
    assert manifest == out.manifest
    np.testing.assert_array_equal(rows_of(folder, manifest, "train"), rows_NL)
    assert folder.names() == ["manifest.json", "train"]
    elsewhere = type(folder.filesystem)(skip_instance_cache=True)
    elsewhere.pipe_file(f"{folder.path}/other", b"")
    assert folder.names() == ["manifest.json", "other", "train"]

    with suppress(ZeroDivisionError), folder.open("half", "wb") as file:
        file.write(b"x" * 10)
        _ = 1 / 0
    with folder.open("whole", "wb") as file:
        file.write(b"x" * (6 << 20))
    assert folder.size("whole") == 6 << 20
    assert not folder.exists("half")

    with pytest.raises(DataError, match=f"{bucket}/nope: not found"):
        folder.read_bytes("nope")
    with pytest.raises(DataError, match="s3://no-such-bucket/x/a: not found"):
        Folder.at("s3://no-such-bucket/x").write_bytes("a", b"")
    name = manifest.files("train")[0].name
    folder.remove(name)
    with pytest.raises(DataError, match=rf"{name} row group 0: not found"):
        read_group(folder, manifest, name, 0)
    folder.remove()
    assert not folder.exists("manifest.json")
