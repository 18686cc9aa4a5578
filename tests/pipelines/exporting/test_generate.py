"""`generate` of an exported folder: lengths, budgets, conventions, and what the README shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import dsl
from dsl import conditioning
from dsl.truncation import Truncated
from tests.pipelines.exporting.made import LENGTH, saved, stranger
from tests.pipelines.exporting.test_export import exported

README = Path(__file__).parents[3] / "pipelines/exporting/README.md"
LONGER, BUDGET, SEED = LENGTH + 3, 5, 3
SHARP = {"temperature": 0.5, "nucleus": 0.6, "convention": "drop"}
CODE = f"""
{{shown}}
tokenizer = AutoTokenizer.from_pretrained("exported", trust_remote_code=True)
prompt = tokenizer("the ", return_tensors="pt", add_special_tokens=False).input_ids

def drawn(*known, **settings):
    return model.generate(*known, path="masked", budget={BUDGET}, seed={SEED}, **settings).tolist()

def refused(**settings):
    try:
        model.generate(**settings)
    except ValueError as error:
        return str(error)

print(json.dumps({{{{
    "refused": refused(budget=0),
    "shown": list(ids.shape),
    "prompt": drawn(prompt),
    "longer": drawn(length={LONGER}),
    "longer prompt": drawn(prompt, length={LONGER}),
    "sharp": drawn(**given),
}}}}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    saved(folder / "made")
    exported(folder, "made", "exported")
    return folder


@pytest.fixture(scope="module")
def denoiser(place: Path) -> dsl.Denoiser:
    return dsl.load(place / "made")


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, Any]:
    (shown,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
    return stranger(CODE.format(shown=shown), SHARP, place, HF_HUB_OFFLINE="1")


def test_the_python_of_the_readme_runs(found: dict[str, Any]) -> None:
    assert found["shown"] == [4, 128]


@pytest.mark.parametrize(
    ("case", "text", "length"),
    [("prompt", "the ", LENGTH), ("longer", "", LONGER), ("longer prompt", "the ", LONGER)],
)
def test_a_row_has_the_length_of_training_or_the_given_one(
    found: dict[str, Any], denoiser: dsl.Denoiser, case: str, text: str, length: int
) -> None:
    given = conditioning.read(text, dsl.Vocabulary.char(), mode="prompt", length=length)
    state = conditioning.state([given], denoiser.table_VD)
    sample = dsl.sample(denoiser, dsl.paths.Masked(), state, budget=BUDGET, seed=SEED)
    assert found[case] == sample.tokens_BL.tolist()
    assert len(found[case][0]) == length


def test_a_convention_is_that_of_dsl(found: dict[str, Any], denoiser: dsl.Denoiser) -> None:
    state = dsl.State.masked(1, LENGTH, denoiser.table_VD.shape[1])
    texts = {
        convention: dsl.sample(
            Truncated(denoiser, SHARP["temperature"], SHARP["nucleus"], convention),
            dsl.paths.Masked(), state, budget=BUDGET, seed=SEED,
        ).tokens_BL.tolist()
        for convention in ("keep", "drop")
    }  # fmt: skip
    assert found["sharp"] == texts[SHARP["convention"]] != texts["keep"]


def test_a_budget_of_no_calls_is_refused(found: dict[str, Any]) -> None:
    assert found["refused"] == "budget must be at least one call, got 0"
