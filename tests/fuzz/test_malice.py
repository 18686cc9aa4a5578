"""Files made to run code or to reach out of their folder: nothing runs, nothing is reached.

A canary is a folder that each of them would make.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import dsl
from dsl.vocabulary import Vocabulary
from infra import registry
from infra.checkpoints import COMMIT, consolidate
from infra.errors import Problem
from infra.shards import Shard, read_manifest
from infra.storage import Folder
from pipelines import models
from pipelines.corpus import pieces
from pipelines.evaluation import hub
from pipelines.evaluation.parts import Parts
from pipelines.models import ConverterConfig
from tests.dsl.test_mdlm import training_file, write_folder
from tests.fuzz.judge import judge
from tests.fuzz.test_data import prepared
from tests.fuzz.test_models import saved
from tests.infra.common import Bomb
from tests.infra.workers import Patient

__all__ = ["prepared", "saved"]


@pytest.fixture
def canary(tmp_path: Path) -> Any:
    place = tmp_path / "canary"
    pickle.loads(pickle.dumps(Bomb(place)))
    place.rmdir()  # it would have worked
    yield place
    assert not place.exists()


# --- weights -----------------------------------------------------------------------------------


def as_pickle(file: Path, bomb: Bomb) -> None:
    file.write_bytes(pickle.dumps({"state_dict": bomb}))


def as_torch(file: Path, bomb: Bomb) -> None:
    torch.save({"state_dict": bomb}, file)


def as_old_torch(file: Path, bomb: Bomb) -> None:
    torch.save({"state_dict": bomb}, file, _use_new_zipfile_serialization=False)


def as_npy(file: Path, bomb: Bomb) -> None:
    with file.open("wb") as sink:
        np.save(sink, np.array([bomb], dtype=object), allow_pickle=True)


def as_average(file: Path, bomb: Bomb) -> None:
    """A sound checkpoint but for one object among its settings."""
    torch.save(training_file() | {"hyper_parameters": {"tokenizer": bomb}}, file)


FORMS: tuple[Callable[[Path, Bomb], None], ...] = (
    as_pickle,
    as_torch,
    as_old_torch,
    as_npy,
    as_average,
)
NAMES = ("run.ckpt", "weights.pt", "weights.npy", "pytorch_model.bin", "model.safetensors")


def opened(address: Path) -> Any:
    converter = ConverterConfig(embed_dim=3)
    return judge(lambda: models.load(str(address), converter=converter, tracking_uri=""))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_weights(tmp_path: Path, canary: Path, name: str, form: Callable[..., None]) -> None:
    """As a file, and in a folder of the public code's, alone or beside a sound file."""
    folder = tmp_path / "folder"
    folder.mkdir()
    form(folder / name, Bomb(canary))
    assert opened(folder / name) is None
    (folder / "config.json").write_text('{"n_heads": 2}')
    assert opened(folder) is None
    if name != "model.safetensors":
        write_folder(folder, training_file()["state_dict"], n_heads=2)
        assert opened(folder) is not None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_of_ours(
    saved: Path, tmp_path: Path, canary: Path, name: str, form: Callable[..., None]
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    form(folder / name, Bomb(canary))
    assert opened(folder) is None


@pytest.mark.parametrize("form", FORMS)
def test_a_tokenizer(tmp_path: Path, canary: Path, form: Callable[..., None]) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        form(tmp_path / name, Bomb(canary))
    assert judge(lambda: Vocabulary.load(tmp_path), "tokenizer.json") is None
    (tmp_path / "tokenizer.json").unlink()
    assert judge(lambda: Vocabulary.load(tmp_path), "vocab.json") is None


# --- checkpoints -------------------------------------------------------------------------------


def test_the_pickles_of_torchs_own_checkpoints(tmp_path: Path, canary: Path) -> None:
    """They are passed over beside ours, and are none without it."""
    numbers = {"a": torch.arange(3.0)}
    Patient(str(tmp_path / "run"), keep=1).save(1, numbers, {})
    step = tmp_path / "run/step_000001"
    for name in (".metadata", "__0_0.distcp", "commit.pkl"):
        (step / name).write_bytes(pickle.dumps(Bomb(canary)))
    assert torch.equal(consolidate(str(tmp_path / "run"), 1, "")["a"], numbers["a"])
    (step / COMMIT).unlink()
    assert judge(lambda: consolidate(str(tmp_path / "run"), 1, ""), "step_000001") is None


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "s3://else/where"])
def test_a_commit_does_not_reach_out(tmp_path: Path, name: str) -> None:
    numbers = {"a": torch.arange(3.0)}
    Patient(str(tmp_path / "run"), keep=1).save(1, numbers, {})
    step = tmp_path / "run/step_000001"
    (file,) = step.glob("*.safetensors")
    shutil.copy(file, tmp_path / "secret.safetensors")
    commit = json.loads((step / COMMIT).read_text().replace(file.name, name))
    del commit["sha256"]
    (step / COMMIT).write_text(json.dumps(commit))
    assert judge(lambda: consolidate(str(tmp_path / "run"), 1, ""), name) is None


# --- data --------------------------------------------------------------------------------------


def haunted(file: Path, bomb: Bomb, **columns: Any) -> None:
    """Parquet with pickles wherever somebody might unpickle: in what pandas and Arrow's
    extension types keep beside the columns, and in a column."""
    pickled = pickle.dumps(bomb)
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickled,
    }
    given = pa.table(columns)
    fields = [field.with_metadata(extension) for field in given.schema]
    beside = {b"pandas": pickled, b"evaluation": pickled}
    pq.write_table(given.cast(pa.schema(fields, metadata=beside)), file)


def test_a_corpus(tmp_path: Path, canary: Path) -> None:
    file = tmp_path / "a.parquet"
    haunted(file, Bomb(canary), text=["some", "words"])
    assert [piece.text for piece in pieces(str(file), "text")] == ["some", "words"]
    haunted(file, Bomb(canary), text=[pickle.dumps(Bomb(canary))])
    assert judge(lambda: list(pieces(str(file), "text")), "a.parquet") is None
    for form in FORMS:
        form(tmp_path / "a.txt", Bomb(canary))
        assert judge(lambda: list(pieces(str(tmp_path / "a.txt"), "text")), "a.txt") is None


def test_a_part_of_an_evaluation(tmp_path: Path, canary: Path) -> None:
    (tmp_path / "group").mkdir()
    haunted(tmp_path / "group/00000000.parquet", Bomb(canary), nats=[1.0])
    parts = Parts(Folder.at(str(tmp_path)))
    assert judge(lambda: parts.read("group"), "00000000.parquet") is None


OUTSIDE = (
    "../x", "train/../../x", "/etc/passwd", "s3://else/where", "file:///etc/passwd", "a\\..\\x",
    "train/./x", "~/x", ".hidden", "train//x", "", "x\n", "\u2024\u2024/x", "train/..", "C:x",
)  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_does_not_reach_out(prepared: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "data"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert judge(lambda: read_manifest(str(folder)), "manifest.json") is None
    with pytest.raises(ValueError, match="not a plain relative file name"):
        Shard(name=name, rows=1, bytes=1, sha256="")


# --- the registry and the hub ------------------------------------------------------------------

DESCRIPTION = {
    "flavors": {
        "python_function": {
            "artifacts": {"model": {"path": "artifacts/model", "uri": "weights"}},
            "code": "code",
            "loader_module": registry.LOADER,
            "model_code_path": "model.py",
        }
    }
}


@pytest.fixture
def registered(tmp_path: Path, saved: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A downloaded model whose code makes the canary on being imported."""
    root = tmp_path / "root"
    shutil.copytree(saved, root / "artifacts/model")
    (root / "code/dsl").mkdir(parents=True)
    for code in ("model.py", "code/dsl/__init__.py", "code/sitecustomize.py", "conftest.py"):
        (root / code).write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    (root / "MLmodel").write_text(yaml.safe_dump(DESCRIPTION))
    monkeypatch.setattr(registry, "_fetch", lambda *asked: root)
    return root


def fetched() -> Any:
    converter = ConverterConfig()
    return judge(lambda: models.load("models:/x/1", converter=converter, tracking_uri=""))


def test_the_weights_of_a_registered_model_come_without_its_code(registered: Path) -> None:
    assert isinstance(fetched().denoiser, dsl.Denoiser)


@pytest.mark.parametrize(
    "name",
    [
        "python_model.pkl",
        "artifacts/model/model.pt",
        "code/x.pyc",
        "code/x.so",
        "artifacts/m.joblib",
    ],
)
def test_a_file_that_could_hold_a_pickle(registered: Path, canary: Path, name: str) -> None:
    (registered / name).write_bytes(pickle.dumps(Bomb(canary)))
    assert fetched() is None


@pytest.mark.parametrize("path", ["../../elsewhere", "/", "..", "link"])
def test_a_registered_model_does_not_reach_out(registered: Path, saved: Path, path: str) -> None:
    shutil.copytree(saved, registered.parents[1] / "elsewhere")
    (registered / "link").symlink_to(registered.parents[1] / "elsewhere")
    description = yaml.safe_load((registered / "MLmodel").read_text())
    description["flavors"]["python_function"]["artifacts"]["model"]["path"] = path
    (registered / "MLmodel").write_text(yaml.safe_dump(description))
    assert fetched() is None
    shutil.rmtree(registered.parents[1] / "elsewhere")


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.mkdir [{canary}]", "!!python/name:os.mkdir ", "!!python/module:os "],
)
def test_a_description_is_plain_yaml(registered: Path, canary: Path, tag: str) -> None:
    (registered / "MLmodel").write_text("flavors: " + tag.format(canary=canary))
    assert fetched() is None


def test_an_index_of_the_hub_does_not_reach_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("../../x.safetensors", "/etc/passwd"):
        (tmp_path / hub.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(Problem, match="is missing"):
            hub.find(str(tmp_path), "judge.model")
