"""Which cells there are, and which of them a kind of model can walk."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from dsl import paths
from dsl.truncation import Nucleus
from pipelines import kinds
from pipelines.evaluation.cells import PathConfig, cells, longest
from pipelines.kinds import KINDS

SDE, MASKED = paths.SentenceSDE(gamma_max=9.0), paths.Masked()
HYBRID = paths.Hybrid(SDE, MASKED, split=(2, 3))


def test_who_can_walk_where() -> None:
    refused = {
        (name, walk)
        for name, kind in KINDS.items()
        for walk, path in {
            "sde": SDE,
            "masked": MASKED,
            "hybrid": HYBRID,
            "only_masked": paths.Hybrid(SDE, MASKED, split=(0, 4)),
            "in_order": paths.Order("left_to_right"),
        }.items()
        if kind.refusal(path, 4, 4)
    }
    assert refused == {
        ("mdlm", "sde"),
        ("mdlm", "hybrid"),
        ("ar", "sde"),
        ("ar", "masked"),
        ("ar", "hybrid"),
        ("ar", "only_masked"),
    }
    assert KINDS["ar"].refusal(paths.Order("left_to_right"), 3, 4)


def test_budgets_that_nobody_gave() -> None:
    assert PathConfig(path=MASKED).walks(11) == ((MASKED, 11),)
    assert PathConfig(path=HYBRID).walks(11) == ((HYBRID, 5),)


def test_a_hybrid_is_walked_with_every_split() -> None:
    entry = PathConfig(path=HYBRID, splits=((16, 48), (32, 32)))
    found = cells(["a", "b"], {"hybrid": entry}, 8)
    assert [cell.budget for cell in found] == [64] * 4
    assert [cell.split for cell in found[:2]] == [(16, 48), (32, 32)]
    names = [cell.name for cell in found]
    assert names == ["a-hybrid-16+48", "a-hybrid-32+32", "b-hybrid-16+48", "b-hybrid-32+32"]


def test_no_two_cells_share_a_name() -> None:
    entries = {"m": PathConfig(path=MASKED, budgets=(4, 8)), "h": PathConfig(path=HYBRID)}
    walked = cells(["a", "b"], entries, 8)
    nuclei = (None, Nucleus(p=0.9), Nucleus(p=1.0))
    heated = [
        replace(cell, temperature=temperature, nucleus=nucleus)
        for cell in walked
        for temperature in (0.7, 0.75, 1.0)
        for nucleus in nuclei
    ]
    names = [cell.name for cell in (*walked, *heated)]
    assert len(set(names)) == len(names)


def test_the_longest_walk_of_each_path_is_watched() -> None:
    entries = {"m": PathConfig(path=MASKED, budgets=(4, 16, 8)), "h": PathConfig(path=HYBRID)}
    found = longest(cells(["a", "b"], entries, 8))
    assert [cell.name for cell in found] == ["a-m-16", "a-h-2+3", "b-m-16", "b-h-2+3"]


@pytest.mark.parametrize(
    ("path", "given", "words"),
    [
        (MASKED, {"splits": ((1, 2),)}, "splits are for hybrid paths"),
        (HYBRID, {"splits": ((1, 2),), "budgets": (3,)}, "not both"),
        (HYBRID, {"budgets": (4,)}, "2 \\+ 3"),
        (MASKED, {"budgets": (0,)}, "at least one call"),
        (MASKED, {"budgets": (4, 8, 4)}, "budgets holds 4 twice"),
        (HYBRID, {"splits": ((1, 4), (2, 3), (1, 4))}, r"splits holds \(1, 4\) twice"),
    ],
)
def test_what_does_not_fit_is_refused(path: object, given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PathConfig(path=path, **given)


def test_no_other_file_spells_a_kind() -> None:
    """But for the benchmarks and the check of GPUs, whose figures have such names."""
    room = Path(kinds.__file__).parent
    spelled = {
        path.name
        for path in room.rglob("*.py")
        if not {"benchmarks", "gpu_check"} & set(path.parts)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in {"mdlm", "ar"}
    }
    assert spelled == {"kinds.py"}
