"""What a process of an evaluation keeps open."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from infra.pool import PoolConfig
from infra.storage import Folder
from pipelines.evaluation.workspace import Workspace, copied


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


def test_every_address_has_a_folder_of_its_own() -> None:
    """Two judges whose addresses differ in marks alone are two networks."""
    addresses = ("runs/small_ar", "runs/small-ar", "models:/ar/1", "models:/ar@1")
    names = {copied(address) for address in addresses}
    assert len(names) == len(addresses)
    assert all(name.replace("-", "").isalnum() for name in names)
