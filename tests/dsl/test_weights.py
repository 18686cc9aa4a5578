"""What is saved comes back bit for bit, and nothing else is ever taken for it."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import dsl
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiT, DiTConfig
from dsl.errors import WeightsError
from dsl.lora import Lora
from dsl.state import State
from dsl.vocabulary import Vocabulary
from dsl.weights import read_config


@pytest.fixture
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    backbone = DiT(DiTConfig(tokens=11, width=16, blocks=2, heads=2, cond_dim=8))
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Denoiser(
        DenoiserConfig(backbone=backbone.config, embed_dim=6, beta=1.0, mask_prior=0.9), backbone
    ).eval()


def forget(folder) -> None:
    """Leave out the checksums, as folders did before there were any."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert set(config.pop("sha256")) <= {"model.safetensors", "tokenizer.json"}
    path.write_text(json.dumps(config))


def rewrite(folder, change) -> None:
    """Edit the tensors of a saved model, as somebody would who means it."""
    forget(folder)
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_it_comes_back_bit_for_bit(denoiser, tmp_path, dtype):
    denoiser = denoiser.to(dtype)
    dsl.save(denoiser, tmp_path)
    loaded = dsl.load(tmp_path)
    assert loaded.config == denoiser.config
    assert not loaded.training
    for (name, one), (_, other) in zip(
        denoiser.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name
    state = State.masked(1, 5, 6)
    assert torch.equal(loaded(state).log_probs(), denoiser(state).log_probs())


def spoil_with_adapters(denoiser: Denoiser) -> None:
    pytest.importorskip("peft", reason="the extra `hub` is not installed")
    Lora().attached(denoiser, seed=0)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_with_adapters, "unexpected: .*lora_A.* Merge adapters"),
        (lambda d: d.backbone.to(torch.bfloat16), "of another precision"),
        (lambda d: d.converter.bias_U.data[0].fill_(-torch.inf), "not finite: converter.bias_U"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(denoiser, tmp_path, spoil, reason):
    dsl.save(denoiser, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    spoil(denoiser)
    with pytest.raises(WeightsError, match=reason):
        dsl.save(denoiser, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_loaded_model_trains(denoiser, tmp_path):
    dsl.save(denoiser, tmp_path)
    loaded = dsl.load(tmp_path).train()
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    loaded(State.masked(1, 5, 6)).log_probs().sum().backward()


def test_a_folder_is_the_three_files_and_remembers_what_it_was_told(denoiser, tmp_path):
    vocabulary = Vocabulary.char()
    dsl.save(denoiser, tmp_path / "new", vocabulary, metadata={"objective": "mdlm", "length": 8})
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert read_config(tmp_path / "new")["metadata"] == {"objective": "mdlm", "length": 8}
    assert Vocabulary.load(tmp_path / "new").sha256 == vocabulary.sha256
    # Saving over it leaves nothing of the old.
    dsl.save(denoiser, tmp_path / "new")
    assert not (tmp_path / "new" / "tokenizer.json").exists()
    assert read_config(tmp_path / "new")["metadata"] == {}


@pytest.mark.parametrize("broken", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_interrupted_save_never_looks_finished(denoiser, tmp_path, monkeypatch, broken):
    vocabulary = Vocabulary.char()
    dsl.save(denoiser, tmp_path, vocabulary)
    replace = type(tmp_path).replace

    def fail(self, target):
        if target.name == broken:
            raise OSError("no space left on device")
        return replace(self, target)

    monkeypatch.setattr(type(tmp_path), "replace", fail)
    with pytest.raises(OSError, match="no space"):
        dsl.save(denoiser, tmp_path, vocabulary)
    with pytest.raises(WeightsError, match=r"config\.json: no such file"):
        dsl.load(tmp_path)


def test_every_misfit_is_listed_in_one_message(denoiser, tmp_path):
    dsl.save(denoiser, tmp_path)

    def spoil(tensors):
        del tensors["backbone.blocks.0.norm1.weight"]
        tensors["backbone.blocks.7.norm1.weight"] = torch.ones(16)
        tensors["converter.beta"] = torch.ones(2)
        tensors["table.direction_VD"][3, 2] = torch.nan

    rewrite(tmp_path, spoil)
    with pytest.raises(WeightsError) as caught:
        dsl.load(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "model.safetensors"))
    assert "missing: backbone.blocks.0.norm1.weight;" in message
    assert "unexpected: backbone.blocks.7.norm1.weight;" in message
    assert "mis-shaped: converter.beta [2], not [1];" in message
    assert "not finite: table.direction_VD." in message


def test_a_long_list_is_cut_and_counted(denoiser, tmp_path):
    dsl.save(denoiser, tmp_path)

    def rename(tensors):
        for name in [name for name in tensors if name.startswith("backbone.blocks.")]:
            tensors["module." + name] = tensors.pop(name)

    rewrite(tmp_path, rename)
    with pytest.raises(WeightsError, match=r"missing: .* and 16 more; unexpected: .* and 16 more"):
        dsl.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", None, "no such file"),
        ("config.json", b"", "not a readable JSON"),
        ("config.json", b"\xff\xfe{", "not a readable JSON"),
        ("config.json", b"[1]", "holds list"),
        ("config.json", b"{}", "from_mdlm"),
        ("config.json", b'{"format": "dsl/1"}', "does not describe"),
        ("config.json", b'{"format": "dsl/1", "denoiser": {"depth": 1}}', "does not describe"),
        ("config.json", b'{"format": "dsl/1", "denoiser": 3}', "does not describe"),
        (
            "config.json",
            b'{"format": "dsl/1", "denoiser": {"backbone": {"kind": "transformers", "tokens": 3, '
            b'"blocks": 1, "settings": {}, "never": ["a"]}}}',
            r"never: \('a',\) does not fit",
        ),
        ("model.safetensors", None, "no such file"),
        ("model.safetensors", b"", "damaged"),
        ("config.json", b'{"format": "dsl/1", "sha256": 3}', "damaged"),
    ],
)
def test_damage_is_one_message(denoiser, tmp_path, name, content, reason):
    dsl.save(denoiser, tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=reason) as caught:
        dsl.load(tmp_path)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_flipped_bit_is_found(denoiser, tmp_path, name):
    dsl.save(denoiser, tmp_path, Vocabulary.char())
    content = bytearray((tmp_path / name).read_bytes())
    content[-5] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=rf"{name}: damaged"):
        dsl.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, -10])
def test_half_a_file_is_refused_without_a_checksum_too(denoiser, tmp_path, keep):
    dsl.save(denoiser, tmp_path)
    forget(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="not a whole safetensors"):
        dsl.load(tmp_path)


def test_a_folder_of_the_first_format_loads(denoiser, tmp_path):
    """It has no checksums, and its backbone no kind."""
    dsl.save(denoiser, tmp_path)
    forget(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["denoiser"]["backbone"].pop("kind") == "dit"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert dsl.load(tmp_path).config == denoiser.config


def test_a_config_of_another_size_is_refused(denoiser, tmp_path):
    dsl.save(denoiser, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["denoiser"]["backbone"]["width"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="mis-shaped"):
        dsl.load(tmp_path)


def test_importing_dsl_imports_little_but_torch():
    heavy = "{'safetensors', 'tokenizers', 'transformers', 'ray', 'mlflow', 'torch._dynamo'}"
    code = f"import sys, dsl; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
