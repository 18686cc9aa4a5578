"""Names that would make an evaluation fail after all is measured are refused before."""

from __future__ import annotations

from typing import Any

import pytest

from dsl.paths import Masked
from pipelines.evaluation.cells import PathConfig
from pipelines.evaluation.questions.judge import NGramJudge
from pipelines.evaluation.settings import EvaluateConfig

LONGEST = "n" * 64


def asked(*, model: str = "a", path: str = "p", judge: str = "j", name: str = "n") -> Any:
    return EvaluateConfig(
        name=name,
        data="data",
        models={model: "runs/a"},
        paths={path: PathConfig(path=Masked())},
        judges={judge: NGramJudge()},
    )


@pytest.mark.parametrize("key", ["model", "path", "judge"])
def test_a_name_is_short_enough_for_the_figures_that_hold_several(key: str) -> None:
    asked(model=LONGEST, path=LONGEST, judge=LONGEST, name=2 * LONGEST)
    with pytest.raises(ValueError, match="at most 64"):
        asked(**{key: f"{LONGEST}n"})


def test_no_model_takes_the_place_of_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"no model may be named tokenizer.json"):
        asked(model="tokenizer.json")


def test_the_name_of_the_run_is_looked_at() -> None:
    with pytest.raises(ValueError, match="name must be letters"):
        asked(name="a/b")
