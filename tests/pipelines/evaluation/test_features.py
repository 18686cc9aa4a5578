"""Features are mauve-text's own, in batches; what cannot be opened is one message beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dsl.channel import observe
from dsl.noise import Draws
from infra.errors import ConfigError, DataError, InfraError, Problem
from infra.storage import Folder
from pipelines import models
from pipelines.evaluation import held_out, hub
from pipelines.evaluation.features import HubFeaturizer, OwnFeaturizer
from pipelines.evaluation.questions.mauve import READER
from tests.pipelines import tiny
from tests.pipelines.evaluation import strangers
from tests.pipelines.evaluation.small import own

TEXTS = [
    "one", "two thousand three", "<|endoftext|>forty<|endoftext|>", "ünïcode \ufffd",
    *tiny.documents(4), "five six",
]  # fmt: skip
NO_TOKENS = np.zeros((len(TEXTS), 0), np.int64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty cache of the hub; a function that says where the hub is."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def at(endpoint: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )

    return at


def featurize(folder: Path, texts: list[str], **settings: Any) -> np.ndarray:
    featurizer = HubFeaturizer(model=str(folder), **settings)
    read = featurizer.load(READER, "cpu")(texts, NO_TOKENS[: len(texts)])
    return read.features_NF


# --- a stranger's model --------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [strangers.POSITIONS, 5])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_features_are_those_of_mauve_text(folder: Path, max_tokens: int, batch: int) -> None:
    from mauve.compute_mauve import get_features_from_input

    theirs = get_features_from_input(
        None, None, TEXTS, str(folder), max_tokens, -1, name="p", batch_size=1
    )
    ours = featurize(folder, TEXTS, max_tokens=max_tokens, batch=batch)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    assert len(np.unique(theirs.round(3), axis=0)) == len(TEXTS)  # no two alike: order shows


def test_features_in_bfloat16_are_near(folder: Path) -> None:
    full = featurize(folder, TEXTS, max_tokens=5, precision="float32")
    half = featurize(folder, TEXTS, max_tokens=5, precision="bfloat16")
    assert half.dtype == np.float32
    assert 0 < np.abs(half - full).max() < 0.1 * np.abs(full).max()


def test_a_bidirectional_model_does_not_see_the_padding(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    encoder = strangers.tokenizer()
    settings = BertConfig(
        vocab_size=len(encoder), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=strangers.POSITIONS, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = strangers.save(
        BertModel(settings, add_pooling_layer=False), encoder, tmp_path / "bert"
    )
    texts = ["one", "two thousand three", "twenty"]
    alone = featurize(folder, texts, max_tokens=40, batch=1)
    np.testing.assert_allclose(featurize(folder, texts, max_tokens=40, batch=3), alone, atol=2e-6)


def test_batches_hold_texts_of_like_length() -> None:
    sequences = [[5], [6, 6, 6], [7, 7], [8, 8, 8, 8], [9, 9]]
    first, second, third = hub.batches(sequences, 2, "cpu")
    assert (first.rows, second.rows) == ([3, 1], [2, 4])
    assert first.ids_BL.tolist() == [[8, 8, 8, 8], [6, 6, 6, 0]]
    assert first.mask_BL.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert second.mask_BL.tolist() == [[1, 1], [1, 1]]
    assert third.rows == [0]  # one token would be padding for half


def test_an_empty_text_is_read_as_the_start_token(folder: Path) -> None:
    empty, start = featurize(folder, ["", "<|endoftext|>"], max_tokens=8)
    np.testing.assert_array_equal(empty, start)


def test_the_mean_over_tokens_leaves_the_padding_out(folder: Path) -> None:
    texts = ["one", "two thousand three", "twenty"]
    alone = featurize(folder, texts, max_tokens=40, batch=1, pooling="mean")
    batched = featurize(folder, texts, max_tokens=40, batch=3, pooling="mean")
    np.testing.assert_allclose(batched, alone, atol=2e-6)
    last = featurize(folder, texts, max_tokens=40, batch=1)
    np.testing.assert_allclose(  # of a single token they are the same
        *(featurize(folder, ["x"], max_tokens=2, pooling=pooling) for pooling in ("mean", "last"))
    )
    assert np.abs(last - alone).max() > 1e-3


def test_real_texts_must_be_as_long_as_the_cut(folder: Path, world: Path) -> None:
    """Rows of 32 characters: no features are taken of texts that differ in length."""
    data = held_out.read(str(world / "data/shards"), "validation", 6, corpus_rows=9, seed=0)
    tokenizer = hub.open(str(folder), "AutoModel", "cpu", where="").tokenizer
    texts = [data.vocabulary.decode(row) for row in data.rows_NL.tolist()]
    shortest = min(len(tokenizer(text)["input_ids"]) for text in texts)
    HubFeaturizer(model=str(folder), max_tokens=shortest).check_data(READER, data)
    with pytest.raises(ConfigError, match=rf"max_tokens.*At most {shortest}$"):
        HubFeaturizer(model=str(folder), max_tokens=strangers.POSITIONS).check_data(READER, data)


def test_lengths_are_the_tokens_that_were_read(folder: Path) -> None:
    featurizer = HubFeaturizer(model=str(folder), max_tokens=3)
    read = featurizer.load(READER, "cpu")(["", "x", TEXTS[1]], NO_TOKENS[:3])
    assert read.tokens_N.tolist() == [1, 1, 3]


def test_a_folder_is_checked_without_a_hub(folder: Path, cache: Any) -> None:
    cache("http://127.0.0.1:9")
    HubFeaturizer(model=str(folder), max_tokens=strangers.POSITIONS).check(READER, "")


def test_a_name_is_downloaded_once(folder: Path, cache: Any) -> None:
    featurizer = HubFeaturizer(model="someone/gpt2-tiny", max_tokens=8)
    with strangers.hub({"someone/gpt2-tiny": folder}) as endpoint:
        cache(endpoint)
        featurizer.check(READER, "")
    cache("http://127.0.0.1:9")  # and now without a network
    featurizer.check(READER, "")
    np.testing.assert_array_equal(
        featurizer.load(READER, "cpu")(TEXTS, NO_TOKENS).features_NF,
        featurize(folder, TEXTS, max_tokens=8),
    )


def test_nothing_is_unpickled(folder: Path, tmp_path: Path, cache: Any) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (pickled / name).write_bytes((folder / name).read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"never read")
    with strangers.hub({"someone/pickled": pickled}) as endpoint:
        cache(endpoint)
        for model in (str(pickled), "someone/pickled"):
            error = refused(DataError, model)
            assert "its weights are pytorch_model.bin alone" in error
            assert "someone" not in model or "kind=own" in error
    assert not list((tmp_path / "cache").rglob("*.bin"))


def refused(kind: type[Problem], model: str, max_tokens: int = 8) -> str:
    with pytest.raises(kind) as error:
        HubFeaturizer(model=model, max_tokens=max_tokens).check(READER, "")
    assert type(error.value) is kind
    assert len(str(error.value)) < 500
    return str(error.value)


def test_an_absent_hub_is_one_message(cache: Any) -> None:
    cache("http://127.0.0.1:9")
    error = refused(InfraError, "gpt2-large")
    assert error.startswith(
        "mauve.featurizer.model: gpt2-large is not on this machine, and the hub "
    )
    assert error.endswith("featurizer.kind=own with a model of your own, the offline stand-in")


def test_a_cache_that_cannot_be_written_is_not_the_hubs_fault(
    folder: Path, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/dev/null/cache")
    with strangers.hub({"someone/gpt2-tiny": folder}) as endpoint:
        cache(endpoint)
        error = refused(InfraError, "someone/gpt2-tiny")
    assert "cannot be kept in the cache on this machine ([Errno 20] Not a directory: " in error
    assert error.endswith("Make room, or set HF_HOME to another folder")


def test_an_unknown_name_is_one_message(cache: Any) -> None:
    with strangers.hub({}) as endpoint:
        cache(endpoint)
        assert "no such folder here and no such model on the hub" in refused(
            DataError, "gpt2-lrage"
        )
    assert "no name that a model of the hub could have" in refused(DataError, "/no/such/folder")


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def tear(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def lose_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def lose_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}'
    )


def garble(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2-of-tomorrow"}')


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lose_config, "there is no config.json"),
        (tear, "cannot be opened"),
        (lose_tokenizer, "there is no tokenizer.json"),
        (lose_shard, "model-00001-of-00002.safetensors is missing"),
        (garble, "cannot be opened"),
    ],
)
def test_a_damaged_folder_is_one_message(tmp_path: Path, spoil: Any, why: str) -> None:
    folder = strangers.gpt2(tmp_path / "gpt2")
    spoil(folder)
    assert why in refused(DataError, str(folder))


def test_no_code_of_theirs_is_run(tmp_path: Path) -> None:
    folder, ran = strangers.gpt2(tmp_path / "gpt2"), tmp_path / "ran"
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w')")
    settings = json.loads((folder / "config.json").read_text())
    theirs = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}
    settings |= {"model_type": "theirs", "auto_map": theirs}
    (folder / "config.json").write_text(json.dumps(settings))
    assert "cannot be opened" in refused(DataError, str(folder))
    with pytest.raises(DataError, match="cannot be opened"):
        hub.open(str(folder), "AutoModel", "cpu", where="mauve.featurizer.model")
    assert not ran.exists()


def test_weights_that_would_be_made_up_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = strangers.gpt2(tmp_path / "gpt2") / "model.safetensors"
    tensors = {name: t for name, t in load_file(weights).items() if "h.1.mlp" not in name}
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(DataError, match=r"has no weights for h\.1\.mlp\S+ \(4 are missing\)"):
        hub.open(str(weights.parent), "AutoModel", "cpu", where="mauve.featurizer.model")


def test_more_tokens_than_positions_are_refused(folder: Path) -> None:
    error = refused(ConfigError, str(folder), strangers.POSITIONS + 1)
    assert error.startswith("mauve.featurizer.max_tokens: 49 tokens, but ")
    assert error.endswith("takes 48. At most 48")


# --- a model of our own --------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", ["ar", "mdlm", "dsl"])
def test_own_features_are_pooled_hidden_states(kind: str, pooling: Any) -> None:
    model = own(kind)
    tokens_NL = np.random.default_rng(0).integers(0, 28, (7, 12)).astype(np.uint16)
    featurizer = OwnFeaturizer(model="runs/own", batch=3, pooling=pooling)
    assert featurizer.addresses() == ("runs/own",)
    assert featurizer.label.startswith("stand-in: ")
    opened = []
    workspace: Any = SimpleNamespace(own_reader=lambda address: opened.append(address) or model)
    read = featurizer.load_in(READER, workspace)([""] * 7, tokens_NL)
    assert opened == ["runs/own"]
    tokens_BL = torch.from_numpy(tokens_NL.astype(np.int64))
    if kind == "ar":  # it reads a token one place later
        tokens_BL = torch.cat([tokens_BL, tokens_BL[:, :1]], dim=1)
    state = observe(
        model.denoiser.table_VD, tokens_BL, torch.full(tokens_BL.shape, torch.inf), Draws(0, 0, 0)
    )
    with torch.no_grad():
        states_BLH = model.denoiser.eval().hidden(state)[:, -12:]
    expected_BH = states_BLH[:, -1] if pooling == "last" else states_BLH.mean(1)
    assert read.features_NF.dtype == np.float32
    np.testing.assert_allclose(read.features_NF, expected_BH.numpy(), atol=1e-6)
    assert read.tokens_N.tolist() == [12] * 7


@pytest.mark.parametrize("kind", ["ar", "mdlm", "dsl"])
def test_the_last_token_has_been_read(kind: str) -> None:
    tokens_NL = np.zeros((2, 12), np.uint16)
    tokens_NL[1, -1] = 5
    workspace: Any = SimpleNamespace(own_reader=lambda address: own(kind))
    featurize = OwnFeaturizer(model="runs/own").load_in(READER, workspace)
    one_F, other_F = featurize([""] * 2, tokens_NL).features_NF
    assert np.abs(one_F - other_F).max() > 1e-3


def test_own_model_is_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such model"):
        OwnFeaturizer(model=str(tmp_path / "absent")).check(READER, "")
    model = own("ar")
    assert model.vocabulary
    folder = Folder.at(str(tmp_path / "ar"))
    models.save(folder, model.denoiser, model.vocabulary, kind="ar", length=12)
    OwnFeaturizer(model=folder.url).check(READER, "")


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"batch": 0}])
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        HubFeaturizer(**wrong)
