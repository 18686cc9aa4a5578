"""Model folders, tokenizers and checkpoints of the public code, damaged in every file.

What is accepted is a model that computes, with the very numbers that its file holds.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

import dsl
from dsl.vocabulary import Vocabulary
from dsl.weights import WEIGHTS
from infra.storage import Folder
from pipelines import models
from pipelines.models import ConverterConfig, Model
from tests.dsl.test_mdlm import training_file, write_folder
from tests.fuzz import mutate
from tests.fuzz.judge import judge
from tests.fuzz.mutate import seeds

Damage = Callable[[Random, bytes], bytes]

CHARACTERS = Vocabulary.char()
SMALL = dsl.DenoiserConfig(
    backbone=dsl.DiTConfig(tokens=CHARACTERS.size, width=8, blocks=1, heads=2, cond_dim=4),
    embed_dim=3,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    models.save(Folder.at(str(folder)), dsl.Denoiser(SMALL), CHARACTERS, kind="dsl", length=8)
    # With checksums every change of the other files would be found before anything reads it.
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the public code's models come in."""
    folder = tmp_path_factory.mktemp("public")
    write_folder(folder, training_file()["state_dict"], n_heads=2)
    return folder


@pytest.fixture(scope="module")
def lightning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lightning")
    torch.save(training_file(), folder / "run.ckpt")
    return folder


def opened(address: Path) -> Callable[[], Model]:
    converter = ConverterConfig(embed_dim=3)
    return lambda: models.load(str(address), converter=converter, tracking_uri="")


def require_sound(model: Model | None, weights: Path | None = None) -> None:
    """It computes, and its numbers are those of the file."""
    if model is None:
        return
    denoiser = model.denoiser
    if weights:
        held = load_file(weights)
        assert all(torch.equal(held[name], t) for name, t in denoiser.state_dict().items())
    assert model.vocabulary is None or model.vocabulary.size == len(denoiser.table_VD)
    table_VD = denoiser.table_VD.detach()
    state = dsl.State.masked(1, 2, table_VD.shape[1])
    with torch.no_grad():
        log_probs_BLV = denoiser(state).log_probs()
    assert log_probs_BLV.shape[2] == denoiser.config.backbone.tokens
    assert not log_probs_BLV.isnan().any()
    assert model.length is None or model.length > 0


def header(rng: Random, content: bytes) -> bytes:
    """Safetensors whose header says something else about the same numbers."""
    if rng.random() < 0.3:
        return mutate.bytes_(rng, content)
    (size,) = struct.unpack("<Q", content[:8])
    said = mutate.json_(rng, content[8 : 8 + size])
    said += b" " * (-len(said) % 8)
    length = rng.choice((len(said), len(said), len(said), size, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + said + content[8 + size :]


@pytest.mark.parametrize(
    ("name", "how", "named"),
    [
        ("config.json", mutate.json_, ("config.json", "saved")),
        (WEIGHTS, header, (WEIGHTS, "config.json")),
        ("tokenizer.json", mutate.json_, ("tokenizer.json", "saved")),
    ],
)
@seeds(120)
def test_a_file_of_a_model(
    saved: Path, tmp_path: Path, seed: str, name: str, how: Damage, named: tuple[str, ...]
) -> None:
    folder = mutate.damaged(saved, tmp_path, seed, name, how)
    model = judge(opened(folder), *named)
    require_sound(model, folder / WEIGHTS)
    if model and model.vocabulary:
        require_reading(model.vocabulary)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE as GPT-2's two files."""
    folder = tmp_path_factory.mktemp("pair")
    whole = Vocabulary.train_bpe(["the theme of the thesis " * 9], 270)
    held = json.loads(whole.to_json())["model"]
    (folder / "vocab.json").write_text(json.dumps(held["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in held["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer.json").write_text(whole.to_json())
    return folder


@seeds(100)
def test_a_vocabulary(pair: Path, tmp_path: Path, seed: str) -> None:
    rng = Random(f"vocabulary {seed}")
    folder = mutate.copy_of(pair, tmp_path / "vocabulary")
    name = rng.choice(("tokenizer.json", "vocab.json", "merges.txt"))
    mutate.spoil(rng, folder / name, mutate.bytes_ if name == "merges.txt" else mutate.json_)
    if name != "tokenizer.json":
        (folder / "tokenizer.json").unlink()
    vocabulary = judge(lambda: Vocabulary.load(folder), str(folder))
    if vocabulary:
        require_reading(vocabulary)


def require_reading(vocabulary: Vocabulary) -> None:
    """Every id of a text is one of the vocabulary, which can spell it; or it is refused."""
    (ids,) = judge(lambda: vocabulary.encode(["the theme"])) or [[]]
    assert all(0 <= id < vocabulary.size for id in [*ids, vocabulary.eos, vocabulary.bos])
    assert isinstance(vocabulary.decode(ids), str)
    assert isinstance(vocabulary.bytes_of(ids), bytes)
    assert len(vocabulary.sha256) == 64


@seeds(80)
def test_a_public_folder(public: Path, tmp_path: Path, seed: str) -> None:
    rng = Random(f"public {seed}")
    folder = mutate.copy_of(public, tmp_path / "public")
    name, how = rng.choice(((WEIGHTS, header), ("config.json", mutate.json_)))
    mutate.spoil(rng, folder / name, how)
    require_sound(judge(opened(folder), str(folder)))


@seeds(80)
def test_a_lightning_file(lightning: Path, tmp_path: Path, seed: str) -> None:
    rng = Random(f"lightning {seed}")
    file = mutate.copy_of(lightning, tmp_path / "lightning") / "run.ckpt"
    if rng.random() < 0.5:
        mutate.spoil(rng, file)
    else:
        held = training_file()
        place = rng.choice((held, held["state_dict"], held["ema"], held["ema"]["shadow_params"]))
        keys = list(place) if isinstance(place, dict) else range(len(place))
        place[rng.choice(keys)] = rng.choice(
            (*mutate.STRANGERS[:20], torch.zeros(()), torch.zeros(0), torch.zeros(1).expand(10**12),
             torch.full((3,), torch.nan), torch.zeros(2, 2).to_sparse(), torch.zeros(3).bool())
        )  # fmt: skip
        file.unlink()
        torch.save(held, file)
    require_sound(judge(opened(file), "run.ckpt"))
