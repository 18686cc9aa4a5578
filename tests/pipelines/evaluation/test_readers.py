"""Models of our own that read the texts of others, before anything is measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.errors import ConfigError, DataError
from pipelines.evaluation.features import OwnFeaturizer
from pipelines.evaluation.question import Question
from pipelines.evaluation.questions.judge import Judge, OwnJudge
from pipelines.evaluation.questions.judges import Judges
from pipelines.evaluation.questions.mauve import Mauve
from pipelines.models import ConverterConfig
from tests.dsl import hubs

HELD_OUT: Any = None  # which a model of our own does not look at


def asked(*, trusted: bool = False, embed_dim: int = 64, **sections: Any) -> Any:
    """What a question reads of a configuration."""
    converter = ConverterConfig(embed_dim=embed_dim)
    return SimpleNamespace(converter=converter, trust_remote_code=trusted, **sections)


def test_a_reader_is_opened_with_the_settings_of_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hubs.coded(tmp_path / "coded")
    opened = []
    monkeypatch.setattr(OwnFeaturizer, "require", lambda self, key, model: opened.append(model))
    mauve = SimpleNamespace(featurizer=OwnFeaturizer(model=str(tmp_path / "coded")))
    with pytest.raises(ConfigError, match=r"^mauve.featurizer.model: .*trust_remote_code"):
        Mauve().require(asked(mauve=mauve), HELD_OUT, "")
    Mauve().require(asked(mauve=mauve, trusted=True, embed_dim=4), HELD_OUT, "")
    assert [model.denoiser.config.embed_dim for model in opened] == [4]


@pytest.mark.parametrize(
    ("question", "key", "section"),
    [
        (Judge(), "judge.model", lambda model: {"judge": OwnJudge(model=model)}),
        (Judges(), "judges.ours.model", lambda model: {"judges": {"ours": OwnJudge(model=model)}}),
    ],
)
def test_a_reader_that_is_not_there_is_told_by_its_setting(
    tmp_path: Path, question: Question, key: str, section: Any
) -> None:
    model = str(tmp_path / "absent")
    with pytest.raises(DataError, match=f"^{key}: {model}: no such model"):
        question.require(asked(**section(model)), HELD_OUT, "")
