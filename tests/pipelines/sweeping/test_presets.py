"""The sweeps that are shipped."""

from __future__ import annotations

import pytest

from infra.config import load
from pipelines.sweeping.settings import SweepConfig
from tests.pipelines import tiny


@pytest.mark.parametrize("preset", ["quickstart", "text8", "owt"])
def test_a_preset_is_a_sweep_of_both_levels(preset: str) -> None:
    config = load(SweepConfig, verb="sweep", argv=[preset], presets=tiny.PRESETS)
    assert config.search.count(config.space) >= 6
    assert config.asha is not None
    assert config.asha.grace % config.finetune.train.validate_every == 0
    assert config.asha.rungs(config.finetune.train.steps)
    settings = config.evaluation({"trial-000": "somewhere"})
    assert any(path.splits for path in settings.paths.values())
    assert any(path.nucleus for path in settings.paths.values())
