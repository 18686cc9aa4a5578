"""From text to shards: exact rows, exact counts, the same again, and never half a result."""

from __future__ import annotations

import json
import lzma
import os
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from dsl.errors import VocabularyError
from dsl.vocabulary import TOKENIZER, Vocabulary
from infra.errors import ConfigError, DataError, InfraError
from infra.shards import MANIFEST, read_manifest
from infra.storage import Folder
from pipelines import prepare
from tests.infra.common import rows_of
from tests.pipelines import tiny

TEXTS = [f"{words} " * 3 for words in tiny.documents(60)]


def jsonl(path: Path, texts: list[str] = TEXTS) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def made(*argv: str) -> dict:
    return tiny.execute("prepare", *argv)


def rows(url: str, split: str) -> np.ndarray:
    """The rows as they stand in the shards [N, L]."""
    return rows_of(Folder.at(url), read_manifest(url), split).astype(int)


def vocabulary(url: str) -> Vocabulary:
    return Vocabulary.from_json(Folder.at(url).read_bytes(TOKENIZER).decode())


@pytest.mark.parametrize("blocks", ["eos", "bos_eos"])
def test_rows_are_the_documents_with_their_ends(tmp_path: Path, blocks: str) -> None:
    """Every split is its documents' ids, eos behind each, cut to rows; the tail is dropped."""
    source, out = jsonl(tmp_path / "a.jsonl"), str(tmp_path / "out")
    made(f"source={source}", f"out={out}", f"blocks={blocks}", "length=50", "validation=0.2")
    found, text, begun = vocabulary(out), read_manifest(out).extra["text"], 0
    assert found.sha256 == Vocabulary.char().sha256
    framed = 2 * (blocks == "bos_eos")
    for split in ("train", "validation", "test"):
        documents = TEXTS[begun : begun + text[split]["documents"]]
        begun += len(documents)
        stream = [id for ids in found.encode(documents) for id in [*ids, found.eos]]
        body_NL = rows(out, split)
        if framed:
            assert (body_NL[:, 0] == found.bos).all()
            assert (body_NL[:, -1] == found.eos).all()
            body_NL = body_NL[:, 1:-1]
        assert body_NL.shape == (len(stream) // (50 - framed), 50 - framed)
        np.testing.assert_array_equal(body_NL.ravel(), stream[: body_NL.size])
        assert text[split] == {
            "rows": len(body_NL),
            "tokens": len(stream),
            "documents": len(documents),
            "characters": sum(map(len, documents)),
            "bytes": sum(len(document.encode()) for document in documents),
            "dropped": len(stream) - body_NL.size,
        }
    assert begun == len(TEXTS)


def test_counts_are_of_characters_and_of_bytes(tmp_path: Path) -> None:
    text = "naïve Ωmega 漢字 🙂\n" * 5000
    (tmp_path / "a.txt").write_text(text)
    out = str(tmp_path / "out")
    made(
        f"source={tmp_path / 'a.txt'}", f"out={out}", "validation=0.3", "test=0",
        "vocabulary={kind: bpe, size: 300}", "length=16",
    )  # fmt: skip
    extra = read_manifest(out).extra["text"]
    assert extra.keys() == {"train", "validation"}
    assert sum(split["characters"] for split in extra.values()) == len(text)
    assert sum(split["bytes"] for split in extra.values()) == len(text.encode())
    assert sum(split["documents"] for split in extra.values()) == 1


@pytest.mark.parametrize(("validation", "test"), [(0.05, 0.05), (0.25, 0.0), (0.0, 0.1), (0, 0)])
def test_splits_are_shares_of_characters(tmp_path: Path, validation: float, test: float) -> None:
    """Documents of very unequal length: each split has its share, to within one document."""
    texts = [word * (1 + 37 * i % 400) for i, word in enumerate(["ab ", "cd "] * 100)]
    out = str(tmp_path / "out")
    made(
        f"source={jsonl(tmp_path / 'a.jsonl', texts)}", f"out={out}",
        f"validation={validation}", f"test={test}",
    )  # fmt: skip
    manifest, total = read_manifest(out), sum(map(len, texts))
    for split, share in (("validation", validation), ("test", test)):
        if not share:
            assert split not in manifest.extra["text"]
            assert not manifest.splits[split]
            continue
        characters = manifest.extra["text"][split]["characters"]
        assert abs(characters - share * total) <= max(map(len, texts))
    assert sum(split["characters"] for split in manifest.extra["text"].values()) == total
    shares = f"{1 - validation - test:g} train, {validation:g} validation, {test:g} test"
    assert manifest.split_rule == f"by characters, in order: {shares}"


def test_a_bpe_learns_from_the_training_split_alone(tmp_path: Path) -> None:
    texts = ["aaaa bbbb " * 20] * 20 + ["zzzz qqqq " * 20] * 20
    out = str(tmp_path / "out")
    made(
        f"source={jsonl(tmp_path / 'a.jsonl', texts)}", f"out={out}",
        "validation=0.25", "test=0.25", "vocabulary={kind: bpe, size: 270}",
    )  # fmt: skip
    found = vocabulary(out)
    assert len(found.encode(["aaaa bbbb"])[0]) == 2
    assert len(found.encode(["zzzz qqqq"])[0]) == 9
    manifest = read_manifest(out)
    assert (manifest.vocabulary.kind, manifest.vocabulary.size) == ("bpe", found.size)
    assert manifest.vocabulary.sha256 == found.sha256


def test_a_vocabulary_from_a_bucket(tmp_path: Path) -> None:
    """A tokenizer.json by itself, and the folder that holds it, on any filesystem."""
    memory, source = fsspec.filesystem("memory"), jsonl(tmp_path / "a.jsonl")
    trained = Vocabulary.train_bpe(TEXTS, 280)
    memory.pipe("/test_prepare/bpe/tokenizer.json", trained.to_json().encode())
    for name in ("bpe", "bpe/", "bpe/tokenizer.json"):
        out = f"memory://test_prepare/{len(name)}"
        path = f"memory://test_prepare/{name}"
        made(f"source={source}", f"out={out}", f"vocabulary={{kind: file, path: '{path}'}}")
        assert vocabulary(out).sha256 == read_manifest(out).vocabulary.sha256 == trained.sha256


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl")
    kind = "vocabulary={kind: bpe, size: 400}"
    one, two = (made(f"source={source}", f"out={tmp_path / name}", kind) for name in "ab")
    assert one["digest"] == two["digest"]
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.parquet"))
    assert len(files) == 3
    for file in [*files, TOKENIZER]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_finished_shards_stay_unless_settings_differ_and_a_restart_is_asked_for(
    tmp_path: Path,
) -> None:
    source, out = jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    first = made(f"source={source}", f"out={out}", "length=32")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert made(f"source={source}", f"out={out}", "length=32") == first
    with pytest.raises(ConfigError, match=r"^out: "):
        made(f"source={source}", f"out={out}", "length=16")
    other = jsonl(tmp_path / "b.jsonl")
    with pytest.raises(ConfigError, match=r"^out: "):
        made(f"source={other}", f"out={out}", "length=32")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    second = made(f"source={source}", f"out={out}", "length=16", "existing=restart")
    assert second["digest"] != first["digest"]
    assert second["rows"]["train"] == read_manifest(str(out)).rows("train")
    assert made(f"source={source}", f"out={out}", "length=16") == second


def test_an_interrupted_preparation_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second split leaves nothing finished; the same command makes the same data."""
    source, out = jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    whole = made(f"source={source}", f"out={tmp_path / 'whole'}")
    encode = prepare._encode

    def interrupted(stream, vocabulary, config, split, writer):
        if split == "validation":
            raise KeyboardInterrupt
        return encode(stream, vocabulary, config, split, writer)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_encode", interrupted)
        assert tiny.main("prepare", f"source={source}", f"out={out}") == 130
    assert not (out / MANIFEST).exists()
    assert made(f"source={source}", f"out={out}")["digest"] == whole["digest"]


def test_a_second_preparation_into_one_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first is at work; then it finds the shards of the first."""
    command = [f"source={jsonl(tmp_path / 'a.jsonl')}", f"out={tmp_path / 'out'}"]
    encode = prepare._encode

    def beside_another(*arguments: Any) -> Any:
        with pytest.raises(
            InfraError, match=rf"/out/{MANIFEST}: is being written by process {os.getpid()}"
        ):
            made(*command)
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_encode", beside_another)
        first = made(*command)
    assert made(*command) == first
    assert not [name for name in os.listdir(tmp_path / "out") if "lease" in name]


def test_shards_that_another_process_has_taken_over_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While this one stood still, at the last moment before it writes."""
    out, encode = Folder.at(str(tmp_path / "out")), prepare._encode
    theirs = {
        "train/part-00000.parquet": b"rows",
        "train/part-00001.parquet": b"more",
        MANIFEST: b"{}",
        f".{MANIFEST}.lease/000009.json": b'{"holder": "another"}',
    }

    def taken(stream: Any, vocabulary: Any, config: Any, split: str, writer: Any) -> Any:
        text = encode(stream, vocabulary, config, split, writer)
        if split == "test":
            for name, content in theirs.items():
                out.write_bytes(name, content)
        return text

    monkeypatch.setattr(prepare, "_encode", taken)
    with pytest.raises(InfraError, match="taken over by"):
        made(f"source={jsonl(tmp_path / 'a.jsonl')}", f"out={out.url}")
    assert {name: out.read_bytes(name) for name in theirs} == theirs


def test_a_split_that_gives_no_row_is_told(tmp_path: Path) -> None:
    """Not by the training or the evaluation that would want its rows."""
    source, out = jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    with pytest.raises(DataError, match=r"a\.jsonl: its test split has \d+ tokens, .*test=0"):
        made(f"source={source}", f"out={out}", "length=2000", "validation=0.2", "test=0.02")
    assert not (out / MANIFEST).exists()
    made(f"source={source}", f"out={out}", "length=2000", "validation=0.2", "test=0")
    with pytest.raises(DataError, match=r"its train split has .* too few for a row"):
        made(f"source={source}", f"out={tmp_path / 'long'}", "length=100000")


def test_a_corpus_that_shards_would_replace_is_refused(tmp_path: Path) -> None:
    """By their names, or as a file that an earlier writer has left."""
    (tmp_path / "train").mkdir()
    source = jsonl(tmp_path / "train" / "part-00009.jsonl")
    with pytest.raises(ConfigError, match=r"part-00009\.jsonl of the corpus lies where shards go"):
        made(f"source={tmp_path}/tr*/*.jsonl", f"out={tmp_path}")
    assert Path(source).read_bytes()
    made(f"source={source}", f"out={tmp_path / 'out'}")


def test_a_bad_restart_does_not_cost_the_old_shards(tmp_path: Path) -> None:
    """What can be known before the first row is written is checked before anything is wiped."""
    source, out = jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    first = made(f"source={source}", f"out={out}")
    for argv in (["source=nowhere.txt"], [f"source={source}", "vocabulary.kind=file"]):
        argv += ["vocabulary.path=nowhere"] * (len(argv) > 1)
        with pytest.raises((DataError, VocabularyError)):
            made(*argv, f"out={out}", "existing=restart")
    assert read_manifest(str(out)).digest == first["digest"]


@pytest.mark.parametrize("argv", [["validation=0.5", "test=0.5"], ["length=3"], ["test=-0.1"]])
def test_settings_that_cannot_be_are_refused(argv: list[str]) -> None:
    with pytest.raises(ConfigError):
        tiny.load("prepare", "out=x", *argv)


def test_gpt2_ids_reach_the_shards(test_data: Path, tmp_path: Path) -> None:
    """`Hello world` is 15496, 995 to GPT-2, whose 50257 ids fit 16 bits."""
    (tmp_path / "a.txt").write_text("Hello world")
    out = str(tmp_path / "out")
    made(
        f"source={tmp_path / 'a.txt'}", f"out={out}", "length=4", "blocks=bos_eos",
        "validation=0", "test=0",
        f"vocabulary={{kind: file, path: {test_data / 'gpt2'}}}",
    )  # fmt: skip
    # A body of 2 ids a row: the end mark behind the two words does not fill another.
    np.testing.assert_array_equal(rows(out, "train"), [[50256, 15496, 995, 50256]])
    assert read_manifest(out).dtype == "uint16"


def test_open_web_text(test_data: Path, tmp_path: Path) -> None:
    """Real documents survive the round trip through GPT-2's ids, split by split."""
    with lzma.open(test_data / "owt" / "owt_docs.jsonl.xz", "rt", encoding="utf-8") as file:
        lines = list(islice(file, 120))
    (tmp_path / "owt.jsonl.xz").write_bytes(lzma.compress("".join(lines).encode(), preset=0))
    out = str(tmp_path / "out")
    made(
        f"source={tmp_path / 'owt.jsonl.xz'}", f"out={out}", "length=64",
        f"vocabulary={{kind: file, path: {test_data / 'gpt2'}}}",
    )  # fmt: skip
    found, manifest = vocabulary(out), read_manifest(out)
    assert found.size == 50257
    documents, begun = [json.loads(line)["text"] for line in lines], 0
    for split in ("train", "validation", "test"):
        held = manifest.extra["text"][split]
        stream = rows(out, split).ravel()
        assert held["tokens"] - held["dropped"] == len(stream)
        # A long document may lie on both sides of a border between splits, cut at a seam.
        text = found.decode(stream.tolist())
        whole = "<|endoftext|>".join(documents) + "<|endoftext|>"
        assert whole.startswith(text, begun)
        ends = "<|endoftext|>"
        begun += held["characters"] + len(ends) * held["documents"]
    assert begun == len(whole)


def test_text8(test_data: Path, tmp_path: Path) -> None:
    """text8 by its 27 characters: the ids are the letters, one eos at the very end."""
    with lzma.open(test_data / "text8" / "text8.first12549840.xz", "rt") as file:
        text = file.read(400_000)
    (tmp_path / "text8.xz").write_bytes(lzma.compress(text.encode(), preset=0))
    out = str(tmp_path / "out")
    made(f"source={tmp_path / 'text8.xz'}", f"out={out}", "length=256")
    manifest, begun = read_manifest(out), 0
    assert manifest.vocabulary.size == 28
    for split in ("train", "validation", "test"):
        held, ids = manifest.extra["text"][split], rows(out, split).ravel()
        part = text[begun : begun + held["characters"]]
        begun += len(part)
        wanted = [" abcdefghijklmnopqrstuvwxyz".index(c) for c in part[: len(ids)]]
        np.testing.assert_array_equal(ids[: len(wanted)], wanted)
        assert held["tokens"] == len(part) + (split == "test")
    assert begun == len(text)
