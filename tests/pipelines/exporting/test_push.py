"""Pushed to a hub, and pulled from it by a stranger; nothing is pushed unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsl
from tests.dsl import hubs
from tests.pipelines.exporting.hub import TOKEN, Hub, running
from tests.pipelines.exporting.made import LENGTH, saved, stranger

ROOT = Path(__file__).resolve().parents[3]
NAME = "somebody/a-model"
CODE = """
model = opened(given)
tokenizer = AutoTokenizer.from_pretrained(given, trust_remote_code=True)
print(json.dumps(tokenizer.batch_decode(model.generate(rows=2, seed=5))))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


def environment(hub: Hub, folder: Path, token: str | None) -> dict[str, str]:
    given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    return given | ({"HF_TOKEN": token} if token else {})


def exported(
    hub: Hub, folder: Path, *settings: str, token: str | None = TOKEN, model: str = "made"
) -> tuple[int, str]:
    """The exit code of `export.py` and the last line that it printed."""
    ended = subprocess.run(
        [
            sys.executable,
            str(ROOT / "pipelines" / "export.py"),
            f"model={model}",
            "root=runs",
            *settings,
        ],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "HF_TOKEN"}
        | environment(hub, folder, token)
        | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return ended.returncode, (ended.stderr if ended.returncode else ended.stdout).splitlines()[-1]


@pytest.mark.long
def test_pushed_and_pulled(hub: Hub, tmp_path: Path) -> None:
    saved(tmp_path / "made")
    code, line = exported(hub, tmp_path, "out=out", f"push={NAME}")
    assert code == 0, line
    assert json.loads(line)["pushed"].startswith(f"{hub.url}/{NAME}/commit/")
    assert hub.private == {NAME: True}
    here = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.repositories[NAME] == here
    (tmp_path / "else").mkdir()
    texts = stranger(CODE, NAME, tmp_path / "else", **environment(hub, tmp_path / "else", TOKEN))
    denoiser = dsl.load(tmp_path / "made")
    state = dsl.State.masked(2, LENGTH, 4)
    sample = dsl.sample(denoiser, dsl.paths.Masked(), state, budget=LENGTH, seed=5)
    assert texts == [dsl.Vocabulary.char().decode(ids) for ids in sample.tokens_BL.tolist()]


@pytest.mark.long
def test_nothing_is_pushed_unasked_or_without_a_token(hub: Hub, tmp_path: Path) -> None:
    saved(tmp_path / "made")
    assert exported(hub, tmp_path, "out=quiet")[0] == 0
    assert (tmp_path / "quiet" / "config.json").exists()
    code, line = exported(hub, tmp_path, "out=out", f"push={NAME}", token=None)
    assert (code, "there is no token" in line) == (2, True)
    assert not (tmp_path / "out").exists()
    assert not hub.seen


@pytest.mark.long
def test_a_hub_that_refuses_is_told(hub: Hub, tmp_path: Path) -> None:
    saved(tmp_path / "made")
    code, line = exported(hub, tmp_path, "out=out", f"push={NAME}", token="hf_of_another")
    assert code == 4
    assert f"push: the hub did not take {NAME}" in line
    assert "hf_of_another" not in line
    assert not hub.repositories


@pytest.mark.long
def test_a_model_of_the_hub_is_read_without_its_pickles(hub: Hub, tmp_path: Path) -> None:
    hubs.saved(tmp_path / "base", "bert")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.repositories["somebody/bert"] = files | {"pytorch_model.bin": b"a pickle"}
    code, line = exported(hub, tmp_path, "out=out", model="hf://somebody/bert")
    assert code == 0, line
    assert dsl.load(tmp_path / "out").config == dsl.from_transformers(tmp_path / "base").config
    assert not [request for request in hub.seen if request.endswith("pytorch_model.bin")]
