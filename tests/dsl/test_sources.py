"""Every key that a docstring or a comment cites is explained in `dsl/README.md`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CITED = re.compile(r"\b(0\d\d) (?:§|[ABC]\.\d|eq|algorithm|fig|table|reports|ends)")


def test_every_cited_text_is_in_the_key() -> None:
    known = set(re.findall(r"^\| (0\d\d) \|", (ROOT / "dsl/README.md").read_text(), re.M))
    rooms = [path for room in ("dsl", "pipelines", "tests") for path in (ROOT / room).rglob("*.py")]
    found = {key for path in rooms for key in CITED.findall(path.read_text())}
    assert found == known == {"000", "003", "004"}
