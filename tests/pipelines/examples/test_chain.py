"""Samplers before an exact judge, at a size for a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsl.chain import ChainDenoiser
from infra.storage import Folder
from pipelines.examples import chain
from tests.dsl.laws import ring


def test_along_snr_few_calls_come_closer_to_the_law(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = chain.walks(8)
    chosen = {name: paths[name] for name in ("masked", "second_order", "hybrid")}
    monkeypatch.setattr(chain, "walks", lambda calls: chosen)
    monkeypatch.setattr(chain, "LENGTH", 32)
    monkeypatch.setattr(chain, "BUDGETS", (8,))
    made = chain.certify(Folder.at(str(tmp_path)), 0)
    found = {row["path"]: row["divergence"] for row in made["drawn"]}
    floor = found[chain.LAW]
    assert found["second_order"] - floor < (found["masked"] - floor) / 4
    assert found["hybrid"] < found["masked"]
    assert Path(made["figure"]).stat().st_size > 10_000


def test_the_divergence_is_that_of_the_counted_pairs() -> None:
    law = ChainDenoiser(ring(2), torch.tensor([0.5, 0.5]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    tokens_BL = torch.tensor([[0, 0, 1, 1, 0]])  # 0 to 0, 0 to 1, 1 to 1, 1 to 0
    found = chain._judged(law, torch.cat([tokens_BL, tokens_BL]))
    gap = torch.tensor([0.5 / 0.75, 0.5 / 0.25, 1.0, 1.0]).log().mean()
    assert found["divergence"] == pytest.approx(float(gap))
    assert found["nats"] == pytest.approx(-sum(map(_log, (0.5, 0.75, 0.25, 0.5, 0.5))) / 5)
    assert found["nats_stderr"] == 0


def _log(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log())
