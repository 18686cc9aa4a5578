"""Public checkpoints come in whole and by their average, and run nothing on the way."""

import io
import json
import os
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import dsl
from dsl.errors import WeightsError
from dsl.lightning import read_checkpoint

BOTH = ["mdlm_lightning_small.ckpt", "mdlm_lightning_small_plainhp.ckpt"]


def training_file(width: int = 16, tokens: int = 11, cond: int = 8) -> dict:
    """What a small MDLM training run leaves: raw weights, and an average of other values."""
    torch.manual_seed(0)
    shapes = {
        "vocab_embed.embedding": (tokens + 1, width),
        "sigma_map.mlp.0.weight": (cond, 256),
        "sigma_map.mlp.0.bias": (cond,),
        "sigma_map.mlp.2.weight": (cond, cond),
        "sigma_map.mlp.2.bias": (cond,),
        "rotary_emb.inv_freq": None,
        "blocks.0.norm1.weight": (width,),
        "blocks.0.attn_qkv.weight": (3 * width, width),
        "blocks.0.attn_out.weight": (width, width),
        "blocks.0.norm2.weight": (width,),
        "blocks.0.mlp.0.weight": (4 * width, width),
        "blocks.0.mlp.0.bias": (4 * width,),
        "blocks.0.mlp.2.weight": (width, 4 * width),
        "blocks.0.mlp.2.bias": (width,),
        "blocks.0.adaLN_modulation.weight": (6 * width, cond),
        "blocks.0.adaLN_modulation.bias": (6 * width,),
        "output_layer.norm_final.weight": (width,),
        "output_layer.linear.weight": (tokens + 1, width),
        "output_layer.linear.bias": (tokens + 1,),
        "output_layer.adaLN_modulation.weight": (2 * width, cond),
        "output_layer.adaLN_modulation.bias": (2 * width,),
    }
    inv_freq = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)  # two heads of 8
    state = {
        f"backbone.{name}": inv_freq if shape is None else torch.randn(shape)
        for name, shape in shapes.items()
    }
    shadow = [value + 1 for name, value in state.items() if not name.endswith("inv_freq")]
    return {"state_dict": state, "ema": {"decay": 0.9999, "shadow_params": shadow}}


def write_folder(folder, tensors: dict, **config) -> None:
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", BOTH)
def test_lightning_files_give_whole_averaged_models(references, name):
    plain = torch.load(references / BOTH[1], weights_only=True)
    denoiser = dsl.from_mdlm(references / name)
    names = [n for n in plain["state_dict"] if not n.endswith("inv_freq")]
    assert set(names) == {f"backbone.{n}" for n, _ in denoiser.backbone.named_parameters()}
    assert denoiser.config.backbone == dsl.DiTConfig(
        tokens=100, width=64, blocks=2, heads=4, cond_dim=32
    )
    assert not denoiser.training
    # Their average, and not the raw weights.
    content = read_checkpoint(references / name)
    averages = zip(names, content["ema"]["shadow_params"], strict=True)
    for parameter, average in averages:
        mine = denoiser.get_parameter(parameter)
        assert torch.equal(mine, average[: len(mine)]), parameter
    # The raw weights are others, or this would show nothing.
    raw = content["state_dict"]
    assert any(not torch.equal(denoiser.get_parameter(n), raw[n][:100]) for n in names)


def test_the_average_is_taken_and_not_the_raw_weights(tmp_path):
    content = training_file()
    torch.save(content, tmp_path / "run.ckpt")
    denoiser = dsl.from_mdlm(tmp_path / "run.ckpt", embed_dim=5, beta=2.0, mask_prior=0.5)
    raw = content["state_dict"]
    for name, mine in denoiser.backbone.named_parameters():
        assert torch.equal(mine, raw[f"backbone.{name}"][: len(mine)] + 1), name
    # V drops the mask row in the head and keeps it among the converter's values.
    assert denoiser.table_VD.shape == (11, 5)
    assert denoiser.backbone.head[0].shape == (11, 16)
    assert denoiser.backbone.values_UW.shape == (12, 16)
    assert denoiser.config.backbone.heads == 2
    assert denoiser.converter.beta.item() == 2.0


@torch.no_grad()
def test_folder_and_file_are_the_same_model(tmp_path):
    content = training_file()
    torch.save(content, tmp_path / "run.ckpt")
    average = iter(content["ema"]["shadow_params"])
    tensors = {
        name: value if name.endswith("inv_freq") else next(average)
        for name, value in content["state_dict"].items()
    }
    sizes = {"hidden_dim": 16, "model_length": 8, "n_blocks": 1, "n_heads": 2, "cond_dim": 8}
    sizes["dropout"] = 0.1
    (tmp_path / "hf").mkdir()
    write_folder(tmp_path / "hf", tensors, **sizes)
    one, other = dsl.from_mdlm(tmp_path / "run.ckpt"), dsl.from_mdlm(tmp_path / "hf")
    inputs_BLW = torch.randn(2, 8, 16)
    assert torch.equal(one.backbone(inputs_BLW), other.backbone(inputs_BLW))
    # Only the folder says what it was trained with.
    assert (one.config.backbone.dropout, other.config.backbone.dropout) == (0.0, 0.1)
    # Without the buffer, the configuration says how many heads there are.
    del tensors["backbone.rotary_emb.inv_freq"]
    write_folder(tmp_path / "hf", tensors, **sizes)
    assert dsl.from_mdlm(tmp_path / "hf").config == other.config


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_folder_may_be_of_another_precision(tmp_path, dtype):
    content = training_file()["state_dict"]
    write_folder(tmp_path, {name: value.to(dtype) for name, value in content.items()})
    denoiser = dsl.from_mdlm(tmp_path)
    for name, mine in denoiser.backbone.named_parameters():
        assert torch.equal(mine, content[f"backbone.{name}"][: len(mine)].to(dtype).float()), name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_dim": 32}, "hidden_dim is 16 in the weights and 32"),
        ({"n_heads": 4}, "n_heads is 2 in the weights and 4"),
        ({"n_blocks": 12, "cond_dim": 128}, "cond_dim is 8 .*; n_blocks is 1"),
        ({"dropout": 1.5}, "dropout 1.5 must lie in"),
        ({"dropout": "0.1"}, "not an MDLM DiT"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, change, reason):
    sizes = {"hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "cond_dim": 8}
    write_folder(tmp_path, training_file()["state_dict"], **{**sizes, **change})
    with pytest.raises(WeightsError, match=reason):
        dsl.from_mdlm(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t: t.pop("backbone.blocks.0.norm2.weight"), "missing: blocks.0.norm2.weight"),
        (lambda t: t.update(stray=torch.ones(2)), "unexpected: stray"),
        (
            lambda t: t.update({"backbone.blocks.0.attn_out.weight": torch.ones(16, 3)}),
            r"mis-shaped: blocks.0.attn_out.weight \[16, 3\]",
        ),
        (
            lambda t: t.update({"backbone.output_layer.linear.bias": torch.ones(99)}),
            r"mis-shaped: output_layer.linear.bias \[99\]",
        ),
        (lambda t: t["backbone.vocab_embed.embedding"].fill_(torch.inf), "not finite"),
        (lambda t: t.pop("backbone.vocab_embed.embedding"), "not an MDLM DiT"),
        (lambda t: t["backbone.rotary_emb.inv_freq"].mul_(2), "base 10000"),
        (lambda t: t["backbone.rotary_emb.inv_freq"].resize_(2, 2), "base 10000"),
        (lambda t: t.pop("backbone.rotary_emb.inv_freq"), "how many heads"),
    ],
)
def test_other_weights_are_refused_with_a_list(tmp_path, spoil, reason):
    tensors = training_file()["state_dict"]
    spoil(tensors)
    write_folder(tmp_path, tensors)
    with pytest.raises(WeightsError, match=reason):
        dsl.from_mdlm(tmp_path)


def test_a_file_without_its_average_is_refused(tmp_path):
    content = training_file()
    for name, ema in {
        "none": None,
        "empty": {"shadow_params": []},
        "short": {"shadow_params": content["ema"]["shadow_params"][:-1]},
    }.items():
        torch.save({**content, "ema": ema}, tmp_path / f"{name}.ckpt")
        with pytest.raises(WeightsError, match="shadow_params"):
            dsl.from_mdlm(tmp_path / f"{name}.ckpt")
    del content["ema"]
    torch.save(content, tmp_path / "bare.ckpt")
    with pytest.raises(WeightsError, match="shadow_params"):
        dsl.from_mdlm(tmp_path / "bare.ckpt")


def test_an_average_in_another_order_is_refused(tmp_path):
    content = training_file()
    content["ema"]["shadow_params"].reverse()
    torch.save(content, tmp_path / "run.ckpt")
    with pytest.raises(WeightsError, match=r"order of the parameters, first at backbone\.vocab"):
        dsl.from_mdlm(tmp_path / "run.ckpt")


class Call:
    """An object whose pickle is a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def attacks(marker) -> dict[str, Call]:
    touch, create = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    return {
        "shell": Call(os.system, touch),
        "subprocess": Call(subprocess.getoutput, touch),
        "eval": Call(eval, create),
        "exec": Call(exec, create),
        "open": Call(open, str(marker), "w"),
        "argument": Call(str, Call(eval, create)),
        "pickled": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
    }


@pytest.mark.parametrize("name", attacks("x"))
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, name):
    marker = tmp_path / "ran"
    content = training_file()
    content["hyper_parameters"] = {"config": [{"tokenizer": attacks(marker)[name]}]}
    torch.save(content, tmp_path / "run.ckpt")
    with pytest.raises(WeightsError, match="refused as unsafe") as caught:
        dsl.from_mdlm(tmp_path / "run.ckpt")
    assert not marker.exists()
    assert "Nothing of it was run" in str(caught.value)
    # The attack is real: an unrestricted load runs it.
    torch.load(tmp_path / "run.ckpt", weights_only=False)
    assert marker.exists()


def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "run.ckpt").write_bytes(pickle.dumps(Call(os.system, f"touch {marker}")))
    with pytest.raises(WeightsError, match="refused as unsafe"):
        dsl.from_mdlm(tmp_path / "run.ckpt")
    assert not marker.exists()


def test_unknown_objects_are_data_and_their_modules_are_never_imported(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text(
        "import pathlib\n"
        f"pathlib.Path({str(tmp_path / 'imported')!r}).touch()\n"
        "class Tokenizer:\n"
        "    def __setstate__(self, state):\n"
        f"        pathlib.Path({str(tmp_path / 'filled')!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import trap

    content = training_file()
    tokenizer = trap.Tokenizer()
    tokenizer.state = {"vocab": [1, 2]}
    content["hyper_parameters"] = {"tokenizer": tokenizer}
    torch.save(content, tmp_path / "run.ckpt")
    del sys.modules["trap"], trap
    (tmp_path / "imported").unlink()

    trusted = torch.serialization.get_safe_globals()
    assert dsl.from_mdlm(tmp_path / "run.ckpt").config.backbone.tokens == 11
    assert "trap" not in sys.modules
    assert not (tmp_path / "imported").exists()
    assert not (tmp_path / "filled").exists()
    # Trust ends with the load: nothing stays allowed for whoever loads next.
    assert set(torch.serialization.get_safe_globals()) == set(trusted)


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1000])
def test_a_torn_file_is_one_message(tmp_path, keep):
    buffer = io.BytesIO()
    torch.save(training_file(), buffer)
    (tmp_path / "run.ckpt").write_bytes(buffer.getvalue()[:keep])
    with pytest.raises(WeightsError, match=r"run\.ckpt: refused"):
        dsl.from_mdlm(tmp_path / "run.ckpt")


@pytest.mark.parametrize("content", [b"\x80\x02.", os.urandom(300), b"{}", [1], {"a": 1}, None])
def test_anything_else_is_one_message(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "run.ckpt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "run.ckpt")
    with pytest.raises(WeightsError, match=r"run\.ckpt"):
        dsl.from_mdlm(tmp_path / "run.ckpt")


def test_a_missing_path_is_one_message(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        dsl.from_mdlm(tmp_path / "absent.ckpt")
    with pytest.raises(WeightsError, match=r"config\.json: no such file"):
        dsl.from_mdlm(tmp_path)
