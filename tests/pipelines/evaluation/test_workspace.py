"""What a process of an evaluation keeps open."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsl.passes import PLAIN
from dsl.state import State
from infra.pool import PoolConfig
from infra.storage import Folder
from pipelines import models
from pipelines.evaluation.workspace import Workspace, copied
from tests.pipelines.evaluation.small import own


@pytest.mark.parametrize("gpu", [False, True])
def test_a_gpu_is_used_where_it_was_asked_for(
    gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without processes of a pool, from which it would be hidden."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config: Any = SimpleNamespace(
        folder=Folder.at(str(tmp_path)), workers=PoolConfig(count=0, gpu=gpu)
    )
    assert Workspace(config).device.type == ("cuda" if gpu else "cpu")


@pytest.mark.parametrize("compile", [False, True])
def test_models_are_compiled_where_that_was_asked_for(
    compile: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_folder", lambda *_, **__: own("dsl"))
    blocks: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: blocks.append(block))
    config: Any = SimpleNamespace(
        folder=Folder.at(str(tmp_path)),
        workers=PoolConfig(count=0),
        trust_remote_code=False,
        precision="bfloat16",
        compile=compile,
    )
    denoiser = Workspace(config).model("dsl").denoiser
    assert len(blocks) == compile * len(denoiser.backbone.blocks)
    assert (denoiser.passes is PLAIN) != compile
    assert denoiser.hidden(State.masked(1, 2, 8)).dtype == torch.bfloat16


def test_every_address_has_a_folder_of_its_own() -> None:
    """Two judges whose addresses differ in marks alone are two networks."""
    addresses = ("runs/small_ar", "runs/small-ar", "models:/ar/1", "models:/ar@1")
    names = {copied(address) for address in addresses}
    assert len(names) == len(addresses)
    assert all(name.replace("-", "").isalnum() for name in names)
