"""The model in the registry: what goes in is what `generate` draws, for strangers too."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import dsl
from dsl.dit import DiTConfig
from dsl.huggingface import Adapt
from dsl.truncation import Nucleus
from infra import registry, tracking
from infra.registry import ModelVersion
from infra.storage import Folder
from infra.tracking import RunHandle, connect
from pipelines import models
from pipelines.generate import GenerateConfig, draw, prepare
from pipelines.model import TextModel
from pipelines.models import ConverterConfig
from pipelines.verb import TrackingConfig
from tests.dsl import hubs

LENGTH = 10
CHARACTERS = dsl.Vocabulary.char()
README = Path(__file__).parents[2] / "README.md"
HYBRID = {
    "kind": "hybrid",
    "first": {"kind": "sentence_sde", "gamma_max": 9.0},
    "second": "masked",
    "split": [3, 4],
}


def saved(folder: Path, *, causal: bool = False, vocabulary: dsl.Vocabulary = CHARACTERS) -> Path:
    torch.manual_seed(0)
    backbone = DiTConfig(
        tokens=vocabulary.size, width=16, blocks=1, heads=2, cond_dim=8, dropout=0.0, causal=causal
    )
    denoiser = dsl.Denoiser(dsl.DenoiserConfig(backbone=backbone, embed_dim=4))
    # A fresh head is zero: its posterior would be uniform whatever the state.
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    kind = "ar" if causal else "dsl"
    models.save(Folder.at(str(folder)), denoiser, vocabulary, kind=kind, length=LENGTH)
    return folder


def loaded(folder: Path) -> TextModel:
    model = TextModel()
    model.load_context(SimpleNamespace(artifacts={"model": str(folder)}))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunHandle:
    root = tmp_path_factory.mktemp("runs")
    return tracking.start(
        TrackingConfig(), root=str(root), name="made", params={}, tags={}, config_yaml=""
    )


@pytest.fixture(scope="module")
def made(run: RunHandle, folder: Path) -> ModelVersion:
    return models.register(Folder.at(str(folder)), "tiny", run, tags={"objective": "dsl"})


def test_a_run_registers_the_same_files_once(run: RunHandle, folder: Path, tmp_path: Path) -> None:
    """As an attempt does that follows one which was killed before it wrote the version down."""

    def registered(folder: Path, **tags: str) -> ModelVersion:
        return models.register(Folder.at(str(folder)), "twice", run, tags=tags)

    first = registered(folder, objective="dsl")
    connect(run.uri).delete_registered_model_alias("twice", "candidate")  # which was to be the last
    assert registered(folder, objective="dsl") == first
    assert first.aliases == ("candidate",)
    assert registered(saved(tmp_path / "other", causal=True), objective="ar").version == 2
    assert registered(folder, objective="dsl") == replace(first, aliases=())  # the second has it


def drawn(folder: Path, **settings: Any) -> list[str]:
    """What `generate` draws."""
    config = GenerateConfig(**{"model": str(folder), "rows": 1} | settings)
    model, given = prepare(config)
    return [row["text"] for row in draw(config, model, given, None)]


def test_predicts_what_generate_draws(folder: Path) -> None:
    model, (text,) = loaded(folder), drawn(folder, text="the ", seed=3)
    assert model.predict(None, ["the "], {"seed": 3}) == [text]
    assert text.startswith("the ")
    path = dsl.paths.Hybrid(dsl.paths.SentenceSDE(gamma_max=9.0), dsl.paths.Masked(), split=(3, 4))
    settings = {"temperature": 0.5, "seed": 1}
    (text,) = drawn(folder, text="a__d", path=path, **settings)
    for spec in (HYBRID, json.dumps(HYBRID)):
        assert model.predict(None, ["a__d"], {"path": spec, **settings}) == [text]
    texts = [f"{letter}______" for letter in "abcd"]
    cut = {
        convention: model.predict(None, texts, {"nucleus": 0.4, "convention": convention})
        for convention in ("keep", "drop")
    }
    assert cut["keep"] != cut["drop"]
    for convention, predicted in cut.items():
        nucleus = Nucleus(p=0.4, convention=convention)
        found = [
            drawn(folder, text=text, nucleus=nucleus, first_row=row)
            for row, text in enumerate(texts)
        ]
        assert [text for (text,) in found] == predicted
    for snr in (0.1, 300.0):
        correct = {"mode": "correct", "snr": snr}
        assert model.predict(None, ["teh cat"], correct) == drawn(folder, text="teh cat", **correct)


def test_precision_is_that_of_generate(folder: Path) -> None:
    model, texts = loaded(folder), [f"{letter}________" for letter in "abcdefghijkl"]
    found = {
        precision: model.predict(None, texts, {"precision": precision, "path": HYBRID})
        for precision in ("auto", "float32", "bfloat16")
    }
    assert found["auto"] == found["float32"] == model.predict(None, texts, {"path": HYBRID})
    path = dsl.paths.Hybrid(dsl.paths.SentenceSDE(gamma_max=9.0), dsl.paths.Masked(), split=(3, 4))
    settings = {"path": path, "precision": "bfloat16"}
    assert drawn(folder, text=texts[0], **settings) == found["bfloat16"][:1]
    assert found["bfloat16"] != found["float32"]


def test_every_form_of_input_and_any_batch(folder: Path) -> None:
    model, texts = loaded(folder), ["the ", "", "a__d", "b__e", ""]
    wanted = model.predict(None, texts)
    assert [len(dsl.Vocabulary.char().encode([text])[0]) for text in wanted[2:4]] == [4, 4]
    assert len(set(wanted)) == 5
    assert model.predict(None, [{"text": text} for text in texts]) == wanted
    assert model.predict(None, pd.DataFrame({"text": texts})) == wanted
    assert model.predict(None, pd.DataFrame({"other": texts})) == wanted
    assert model.predict(None, texts[0]) == wanted[:1]
    assert model.predict(None, texts, {"batch": 1}) == wanted


@pytest.mark.parametrize(
    ("kind", "adapt", "room"),
    [("bert", None, 64), ("roberta", None, 63), ("gpt2", "shift", 63), ("gpt2", "no_shift", 64)],
)
def test_a_row_that_the_network_has_no_positions_for_is_refused(
    kind: str, adapt: Adapt | None, room: int, tmp_path: Path
) -> None:
    hubs.saved(tmp_path / "hub", kind, special=hubs.SPECIAL)
    found = models.load(
        str(tmp_path / "hub"), converter=ConverterConfig(), tracking_uri="", adapt=adapt
    )
    assert found.vocabulary
    out = Folder.at(str(tmp_path / "model"))
    models.save(out, found.denoiser, found.vocabulary, kind="mdlm", length=16)
    model, text = loaded(tmp_path / "model"), hubs.WORDS[0]
    assert model.predict(None, [text], {"budget": 1, "length": room})[0].startswith(text)
    with pytest.raises(ValueError, match=f"row 0: it has {room + 1} tokens, .* takes {room}"):
        model.predict(None, [text], {"budget": 1, "length": room + 1})


def test_an_autoregressive_model_reads_from_left_to_right(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path, causal=True))
    assert model.predict(None, ["the "])[0].startswith("the ")
    with pytest.raises(ValueError, match="from left to right"):
        model.predict(None, [""], {"path": "masked"})


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"path": "maskd"}, "Did you mean 'masked'"),
        ({"path": HYBRID, "budget": 9}, "the budget is 9"),
        ({"path": "{kind"}, "path: not JSON"),
        ({"mode": "corect"}, "mode must be one of"),
        ({"length": 3}, "room for 3"),
        ({"nucleus": 0.0}, "nucleus must lie"),
        ({"batch": 0}, "batch must be at least 1 row"),
        ({"precision": "half"}, "precision must be one of"),
    ],
)
def test_bad_parameters_are_told(folder: Path, params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        loaded(folder).predict(None, ["the "], params)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["the ", "much too long"], "row 1: the text has 13 tokens"),
        (["the ", "The "], "row 1: .*'T' is not in this vocabulary"),
        (["the ", None], "row 1: None is not a text"),
        (pd.DataFrame({"text": ["the ", float("nan")]}), "row 1: nan is not a text"),
        ([{"text": ["the "]}], "row 0: .* is not a text"),
        ([{"text": "the "}, {"txt": "the "}], "row 1: None is not a text"),
        ({"text": 3}, "row 0: 3 is not a text"),
        ({"txt": ["the "]}, "no column is called text, only txt"),
        (pd.DataFrame({"id": ["a"], "txt": ["the "]}), "no column is called text, only id, txt"),
    ],
)
def test_a_bad_row_is_named(folder: Path, given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        loaded(folder).predict(None, given)


def test_it_comes_back_from_the_registry(run: RunHandle, made: ModelVersion, folder: Path) -> None:
    path = list(sys.path)
    mlflow.set_tracking_uri(run.uri)
    try:
        model = mlflow.pyfunc.load_model("models:/tiny@candidate")
    finally:
        sys.path[:] = path
        mlflow.set_tracking_uri(None)
    assert model.predict(["the "]) == drawn(folder, text="the ")
    registered = {"model": "models:/tiny@candidate", "tracking": TrackingConfig(uri=run.uri)}
    assert model.predict(["the "]) == drawn(folder, text="the ", **registered)
    ids, column = {"id": ["z", "y"]}, {"text": ["the ", "a__d"]}
    rows = pd.DataFrame({**ids, **column})
    wanted = model.predict(column["text"])
    for given in (column, {**ids, **column}, rows, rows[["text"]], rows.to_dict("records")):
        assert model.predict(given) == wanted
    assert model.predict("the ") == model.predict({"text": "the "}) == wanted[:1]
    params = {"path": json.dumps(HYBRID), "seed": 2, "length": 8}
    hybrid = dsl.paths.from_dict(HYBRID)
    wanted = drawn(folder, text="the ", path=hybrid, seed=2, length=8)
    assert model.predict(["the "], params=params) == wanted
    with pytest.raises(mlflow.MlflowException, match="seed"):
        model.predict(["the "], params={"seed": "three"})


def test_the_python_of_the_readme_runs(
    run: RunHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = dsl.Vocabulary.train_bpe(["The"], 257)
    folder = saved(tmp_path / "runs/quickstart-dsl/model", vocabulary=vocabulary)
    (code,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
    made = models.register(Folder.at(str(folder)), "dsl-quickstart", run, tags={"objective": "dsl"})
    registry.set_alias(made.uri, "champion", run.uri)
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(run.uri)
    try:
        exec(code, found := dict[str, Any]())
    finally:
        mlflow.set_tracking_uri(before)
    assert found["sample"].tokens_BL.shape == (4, 64)


def test_it_says_which_versions_made_it(run: RunHandle, made: ModelVersion, tmp_path: Path) -> None:
    """A later minor version of torch may read it otherwise, or not at all."""
    written = registry._fetch(made.uri, run.uri, str(tmp_path)) / "requirements.txt"
    asked = [Requirement(line) for line in written.read_text().split()]
    assert {one.name for one in asked} == {"mlflow", *models.PACKAGES}
    for one in asked:
        installed = Version(version(one.name)).public  # without the build, such as +cpu
        assert str(one.specifier) == f"=={installed}"


def test_a_stranger_loads_it(
    run: RunHandle, made: ModelVersion, folder: Path, tmp_path: Path
) -> None:
    """A process with MLflow and the registry's address, and nothing of this repository."""
    code = (
        "import json, sys, mlflow\n"
        f"mlflow.set_tracking_uri({run.uri!r})\n"
        "model = mlflow.pyfunc.load_model('models:/tiny@candidate')\n"
        "texts = model.predict(['the ', 'a__d'])\n"
        "rooms = [room for room in ('infra', 'pipelines') if room in sys.modules]\n"
        "print(json.dumps([texts, rooms, sys.modules['dsl'].__file__]))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    texts, rooms, where = json.loads(ended.stdout.splitlines()[-1])
    assert texts == [*drawn(folder, text="the "), *drawn(folder, text="a__d", first_row=1)]
    assert not rooms
    assert not Path(where).is_relative_to(Path(models.__file__).parents[1])
