"""The papers' numbers, to be read beside ours: never plotted, averaged or logged as results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

FILE = Path(__file__).with_name("published.yaml")

Published = Literal["owt_mauve", "owt_hybrid_mauve", "text8_bpc"]


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """Rows as a paper prints them, where they stand there, and what was measured how."""

    source: str
    protocol: str
    rows: tuple[Mapping[str, Any], ...]

    @property
    def note(self) -> str:
        return f"Published, not run here: {self.source} ({self.protocol})."


@lru_cache
def read(name: Published) -> PublishedTable:
    """The published table of that name."""
    table = yaml.safe_load(FILE.read_text(encoding="utf-8"))[name]
    return PublishedTable(**table | {"rows": tuple(table["rows"])})
