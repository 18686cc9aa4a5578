"""What a run starts from: what is kept of the weights' configuration, what may be said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsl
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiTShape
from infra import config
from infra.storage import Folder
from pipelines import models
from pipelines.models import ConverterConfig
from tests.dsl.test_mdlm import training_file, write_folder
from tests.pipelines import tiny

SIZES = {"hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "cond_dim": 8}
SHAPE = {"width": 16, "blocks": 1, "heads": 2, "cond_dim": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def mdlm(tmp_path: Path, data: str) -> Path:
    """A folder of the public code, over the vocabulary of `data`, trained with dropout."""
    folder = tmp_path / "mdlm"
    folder.mkdir()
    write_folder(folder, training_file(tokens=28)["state_dict"], **SIZES, dropout=0.1)
    return folder


def finetune(data: str, mdlm: Path, *settings: str) -> list[str]:
    given = [f"data={data}", f"root={mdlm.parent}", "name=run", f"init={mdlm}"]
    return [*given, "backbone=null", *settings]


def test_an_imported_dropout_is_trained_with_and_kept(data: str, mdlm: Path) -> None:
    tiny.execute("finetune", *finetune(data, mdlm, "train.steps=2"))
    saved = dsl.load(mdlm.parent / "run" / "model")
    assert saved.config.backbone.dropout == 0.1
    assert {block.dropout for block in saved.backbone.blocks} == {0.1}


@pytest.mark.parametrize("verb", ["finetune", "pretrain"])
@pytest.mark.parametrize("setting", ["dropout=0.2", "width=32"])
def test_a_backbone_other_than_the_weights_is_refused(
    data: str, mdlm: Path, verb: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes with the weights, so the key would have no effect."""
    true = ["backbone.width=16", "backbone.blocks=1", "backbone.heads=2", "backbone.dropout=0.1"]
    argv = [*finetune(data, mdlm, *true, "backbone.cond_dim=8"), "--dry-run"]
    assert tiny.main(verb, *argv) == 0
    code, said = tiny.outcome(capsys, verb, *argv, f"backbone.{setting}")
    assert code == 2
    assert f"backbone.{setting.partition('=')[0]}: " in said
    assert "comes with the weights" in said


@pytest.mark.parametrize("verb", ["finetune", "pretrain"])
def test_scratch_is_as_the_backbone_says(data: str, tmp_path: Path, verb: str) -> None:
    argv = [f"data={data}", f"root={tmp_path}", "name=run", "init=scratch", "train.steps=1"]
    tiny.execute(verb, *argv, "backbone.dropout=0.3")
    shape = DiTShape(width=16, blocks=2, heads=2, cond_dim=8, dropout=0.3)
    saved = dsl.load(tmp_path / "run" / "model").config.backbone
    assert saved == shape.config(28, causal=False)


def test_a_folder_in_a_store_may_have_folders_of_its_own(data: str, mdlm: Path) -> None:
    """As many of the hub have, with the weights once more in another format."""
    place = Folder.at("memory://hub/mdlm")
    for path in mdlm.iterdir():
        place.write_bytes(path.name, path.read_bytes())
    place.write_bytes("tokenizer.json", (Path(data) / "tokenizer.json").read_bytes())
    (place / "onnx").write_bytes("model.onnx", b"none of ours")
    model = models.load(place.url, converter=ConverterConfig(), tracking_uri="")
    assert model.denoiser.config.backbone.width == 16
    assert models.read_vocabulary(place.url).size == 28
    assert models.read_vocabulary(place.url_of("tokenizer.json")).size == 28


def test_a_training_file_may_lie_in_a_store(tmp_path: Path) -> None:
    torch.save(training_file(), tmp_path / "run.ckpt")
    store = Folder.at("memory://lightning")
    store.write_bytes("run.ckpt", (tmp_path / "run.ckpt").read_bytes())
    address = store.url_of("run.ckpt")
    model = models.load(address, converter=ConverterConfig(), tracking_uri="")
    assert model.denoiser.config.backbone.width == 16


@pytest.mark.parametrize("objective", ["other", [], {}, None])
def test_a_folder_that_says_another_objective_is_one_message(
    data: str, tmp_path: Path, objective: object, capsys: pytest.CaptureFixture[str]
) -> None:
    of = DenoiserConfig(backbone=DiTShape(**SHAPE).config(28, causal=False), embed_dim=8)
    dsl.save(Denoiser(of), tmp_path / "model", metadata={"objective": objective})
    given = [f"data={data}", f"root={tmp_path}", "name=run", f"init={tmp_path / 'model'}"]
    code, said = tiny.outcome(capsys, "finetune", *given, "backbone=null", "--dry-run")
    assert code == 3
    assert f"config.json: objective {objective!r} and length None are none of a model" in said


def test_the_preset_text8_trains_both_models_from_scratch_with_one_backbone() -> None:
    mdlm, of_dsl = (
        config.load(tiny.CONFIGS[verb], verb=verb, argv=["text8"], presets=tiny.PRESETS)
        for verb in ("pretrain", "finetune")
    )
    assert (mdlm.init, of_dsl.init) == ("scratch", "scratch")
    assert of_dsl.backbone == mdlm.backbone
    assert of_dsl.backbone.dropout == 0.1
