"""What an evaluation has measured so far, and how much of it is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from infra.storage import Folder
from pipelines.evaluation.parts import Parts, lists
from pipelines.evaluation.question import parts_of_texts

GROUP, SIZE, ROWS = "samples/a", 64, 3000


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    kept = Parts(Folder.at(str(tmp_path)))
    for first in range(0, ROWS, SIZE):
        numbers = np.arange(first, min(first + SIZE, ROWS))
        words = [f"text {number}" for number in numbers]
        table = pa.table({"row": numbers, "text": words, "tokens": lists(numbers[:, None])})
        kept.write(GROUP, first, table, {})
    return kept


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 1), (0, 64), (63, 2), (64, 64), (100, 1000), (2990, 10), (2990, 99)],
)
def test_rows_of_a_group_out_of_the_parts_that_hold_them(
    parts: Parts, first: int, count: int
) -> None:
    found = parts.rows(GROUP, first, count, ["row"])
    assert found.column_names == ["row"]
    assert found.equals(parts.read(GROUP, ["row"]).slice(first, count))


def test_texts_that_are_measured_some_at_a_time_are_each_read_once(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    one = Parts.one

    def counted(self: Parts, group: str, first: int, columns: Any = None) -> pa.Table:
        read.append(first)
        return one(self, group, first, columns)

    monkeypatch.setattr(Parts, "one", counted)
    measured = parts_of_texts(
        "parts/read/a", "a", ROWS, lambda workspace, texts, tokens_BL: {"row": tokens_BL[:, 0]}
    )
    workspace: Any = SimpleNamespace(parts=parts)
    rows = np.concatenate([part.work(workspace)["row"].to_numpy() for part in measured])
    assert rows.tolist() == list(range(ROWS))
    assert sorted(read) == list(range(0, ROWS, SIZE))
