"""The loss of twenty steps of MDLM and of DSL, step by step, as it has always been.

A change that is not meant to change what is computed leaves these numbers as they are, to 1e-4
on any x86-64 CPU. One that is meant to makes them anew:

    python -m tests.pipelines.test_golden
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.pipelines import tiny

GOLDEN = Path(__file__).with_name("golden_loss.json")
KEYS = ("loss", "grad_norm", "validation/loss")
SETTINGS = ["train.steps=20", "train.validate_every=10", "train.optimizer.lr=0.002"]


def curves(folder: Path) -> dict[str, dict[str, list[float]]]:
    """{objective: {metric: values, in order of step}}; the second model starts from the first."""
    data = tiny.shards(folder)
    found = {}
    for verb, name, init in (("pretrain", "mdlm", []), ("finetune", "dsl", [folder / "mdlm"])):
        argv = [f"data={data}", f"root={folder}", f"name={name}", *SETTINGS]
        tiny.execute(verb, *argv, *(f"init={run}" for run in init))
        rows = tiny.curve(folder / name)
        found[name] = {key: [row[key] for row in rows if key in row] for key in KEYS}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    return curves(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", ["mdlm", "dsl"])
def test_the_curve_is_the_golden_one(
    found: dict[str, dict[str, list[float]]], name: str, key: str
) -> None:
    golden = json.loads(GOLDEN.read_text())[name][key]
    assert len(golden) == (2 if key.startswith("validation") else 20)
    assert found[name][key] == pytest.approx(golden, rel=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.write_text(json.dumps(curves(Path(scratch)), indent=1) + "\n")
