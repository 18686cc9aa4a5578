"""Models of the transformers library through the verbs: taken, trained, kept, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dsl
from dsl.errors import AdaptationError
from dsl.foreign import ForeignConfig
from infra.errors import ConfigError, DataError
from pipelines import export, generate, models
from pipelines.export import ExportConfig
from pipelines.generate import GenerateConfig
from pipelines.models import ConverterConfig
from tests.dsl import hubs
from tests.pipelines import tiny

BARE = ["[UNK]", "[CLS]", "[SEP]"]  # what a causal model's tokenizer knows


def shards(folder: Path, tokenizer: Path, length: int = 16) -> str:
    """Rows of tokens, encoded by a model's own tokenizer."""
    source = folder / "words.jsonl"
    lines = [" ".join(hubs.WORDS[(i + j) % len(hubs.WORDS)] for j in range(40)) for i in range(400)]
    source.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    given = [f"length={length}", "vocabulary.kind=file", f"vocabulary.path={tokenizer}"]
    out = folder / "shards"
    tiny.execute("prepare", f"source={source}", f"out={out}", *given)
    return str(out)


def argv(data: str, root: Path, name: str, init: Path | str, *settings: str) -> list[str]:
    given = [f"data={data}", f"root={root}", f"name={name}", f"init={init}", "backbone=null"]
    return [*given, "train.steps=4", "train.validate_every=2", *settings]


@pytest.mark.parametrize(("family", "special"), [("bert", hubs.SPECIAL), ("llama", BARE)])
def test_adapted_trained_further_and_made_dsl(
    tmp_path: Path, family: str, special: list[str]
) -> None:
    base = tmp_path / "base"
    hubs.saved(base, family, special=special)
    data = shards(tmp_path, base)
    adapt = "shift" if family in hubs.CAUSAL else "null"
    more = argv(data, tmp_path, "mdlm", base, f"adapt={adapt}")
    tiny.execute("pretrain", *more)
    tiny.execute("finetune", *argv(data, tmp_path, "dsl", tmp_path / "mdlm"))
    made = models.load(str(tmp_path / "dsl"), converter=ConverterConfig(), tracking_uri="")
    assert (made.kind, made.length) == ("dsl", 16)
    backbone = made.denoiser.config.backbone
    assert isinstance(backbone, ForeignConfig)
    assert backbone.settings["model_type"] == family
    losses = [row["loss"] for row in tiny.curve(tmp_path / "dsl")]
    assert len(losses) == 4
    # A base that needs no adaptation, or is given one, is fine-tuned at once as well.
    tiny.execute("finetune", *argv(data, tmp_path, "at-once", base, f"adapt={adapt}"))


def test_code_beside_the_weights_is_run_only_if_it_is_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, runs = tmp_path / "base", tmp_path / "runs"
    hubs.coded(base)
    marker = hubs.marked(base)
    data = shards(tmp_path, base)
    for verb in ("pretrain", "finetune"):
        code, said = tiny.outcome(capsys, verb, *argv(data, runs, verb, base))
        assert (code, "have it run by trust_remote_code" in said) == (2, True), said
        assert not (runs / verb).exists()
    assert not marker.exists()
    trusted = "trust_remote_code=true"
    tiny.execute("pretrain", *argv(data, runs, "mdlm", base, trusted))
    assert marker.exists()
    code, said = tiny.outcome(capsys, "finetune", *argv(data, runs, "dsl", runs / "mdlm"))
    assert (code, "code that came with its weights" in said) == (2, True), said
    tiny.execute("finetune", *argv(data, runs, "dsl", runs / "mdlm", trusted))
    # The run's model holds the code, for whoever trusts it, and MLflow runs what was registered.
    made = runs / "dsl" / "model"
    with pytest.raises(AdaptationError):
        dsl.load(made)
    from pipelines.model import TextModel  # MLflow takes seconds to import

    registered = TextModel()
    registered.load_context(SimpleNamespace(artifacts={"model": str(made)}))
    assert len(registered.predict(None, ["the cat"], {"length": 8})) == 1
    with pytest.raises(ConfigError, match="trust_remote_code"):
        export.execute(ExportConfig(model=str(made), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_rows_that_a_network_does_not_take_are_refused_before_the_first(tmp_path: Path) -> None:
    hubs.saved(tmp_path, "bert", special=hubs.SPECIAL)
    config = GenerateConfig(model=str(tmp_path), text="the cat", length=2000)
    with pytest.raises(DataError, match="length: the model does not take rows of 2000 tokens"):
        generate.prepare(config)


def unmask(folder: Path) -> None:
    hubs.words(folder, hubs.SPECIAL[:-1])


def pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("family", "spoil", "setting", "code", "said"),
    [
        ("bert", unmask, "", 3, "its tokenizer names no mask token"),
        ("bert", pickle, "", 3, "only safetensors are read"),
        ("bert", None, "adapt=shift", 2, "needs no adaptation"),
        ("llama", None, "", 2, "Say how to adapt it"),
        ("bert", None, "long", 3, "does not take rows of 80 tokens"),
        ("roberta", None, "long", 3, "does not take rows of 80 tokens"),
        ("bert", None, "data", 3, "Prepare the data with the model's own tokenizer.json"),
    ],
)
def test_what_does_not_fit_is_one_message(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    spoil: Callable[[Path], Any] | None,
    setting: str,
    code: int,
    said: str,
) -> None:
    hubs.saved(tmp_path / "base", family)
    other = tmp_path / "other"
    hubs.words(other, [*hubs.SPECIAL, "more"])
    tokenizer = other if setting == "data" else tmp_path / "base"
    data = shards(tmp_path, tokenizer, length=80 if setting == "long" else 16)
    if spoil:
        spoil(tmp_path / "base")
    settings = [setting] if "=" in setting else []
    for verb in ("pretrain", "finetune"):
        given = argv(data, tmp_path / "runs", verb, tmp_path / "base", *settings)
        found, message = tiny.outcome(capsys, verb, *given)
        assert (found, said in message) == (code, True), message
        assert not (tmp_path / "runs" / verb).exists()


def test_an_adaptation_without_effect_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hubs.saved(tmp_path / "base", "llama", special=BARE)
    denoiser = dsl.from_transformers(tmp_path / "base", adapt="no_shift")
    dsl.save(denoiser, tmp_path / "kept", dsl.Vocabulary.load(tmp_path / "base"))
    data = shards(tmp_path, tmp_path / "base")
    given = argv(data, tmp_path / "runs", "run", tmp_path / "kept")
    code, said = tiny.outcome(capsys, "finetune", *given, "adapt=shift", "--dry-run")
    assert (code, "adapt: " in said) == (2, True)
    assert tiny.main("finetune", *given, "adapt=no_shift", "--dry-run") == 0
    code, said = tiny.outcome(capsys, "finetune", *given, "init=scratch", "adapt=shift")
    assert (code, "init is scratch" in said) == (2, True)
