"""What several tests of the verbs start from: tiny shards, a finished run, the command line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.pipelines import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.shards(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A finished pretraining run."""
    root = tmp_path_factory.mktemp("finished")
    tiny.execute("pretrain", f"data={data}", f"root={root}", "name=mdlm")
    return root / "mdlm"


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Callable[..., tiny.Outcome]:
    return partial(tiny.outcome, capsys)
