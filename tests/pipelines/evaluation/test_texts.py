"""What the table of texts says of a walk by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dsl.paths import Masked
from dsl.vocabulary import Vocabulary
from pipelines.evaluation.cells import Cell
from pipelines.evaluation.questions import texts

CELL = Cell(model="a", path="p", walk=Masked(), budget=2)


def test_seconds_are_those_of_drawing_and_not_of_opening_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    opened: set[str] = set()

    def model(name: str) -> None:
        now[0] += 0 if name in opened else 100
        opened.add(name)

    def draw(workspace: Any, cell: Cell, first: int, count: int) -> Any:
        workspace.model(cell.model)
        now[0] += 6
        return SimpleNamespace(
            tokens_BL=torch.zeros(count, 4, dtype=torch.int64), row_calls_B=torch.ones(count)
        )

    monkeypatch.setattr(texts, "draw", draw)
    monkeypatch.setattr(texts.time, "perf_counter", lambda: now[0])
    workspace: Any = SimpleNamespace(model=model, vocabulary=Vocabulary.char())
    table = texts._draw(workspace, cell=CELL, first=0, count=3)
    assert table["seconds"].to_pylist() == [2, 2, 2]


def test_the_seconds_of_a_walk_leave_out_the_part_that_compiled_the_network() -> None:
    drawn = {"calls": np.array([2, 2, 2, 1]), "seconds": np.array([60, 0.5, 0.5, 0.4])}
    survey: Any = SimpleNamespace(
        columns=lambda group, *names: {name: drawn[name] for name in names},
        config=SimpleNamespace(questions=()),
    )
    row = texts._of_cell(survey, CELL)
    assert row["seconds"] == 0.5
    assert row["calls"] == 1.75
