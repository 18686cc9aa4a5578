"""The trials of a sweep, on disk: a run directory each, and beside it a record of its settings.

A sweep is continued from these files alone: the state of Ray Tune does not outlive its cluster.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, NamedTuple

from infra import documents, journal
from infra.storage import Folder
from pipelines.runs import RESULT

BOUND = "validation/bound"
PARTS = ("validation/endpoint_bound", "validation/hybrid_bound")
# Set by the search and not by a knob: trials that differ in it alone are repeats of one arm.
SEED = "train.stream.seed"
# failed: its settings are to blame, and it is not tried again. lost: its processes died; the same
# command tries it again.
State = Literal["running", "finished", "stopped", "failed", "lost"]


class Validation(NamedTuple):
    """What a trial reports at a step: upper bounds in nats per token (see `pipelines.kinds`)."""

    step: int
    bound: float
    endpoint: float
    hybrid: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is known of a trial. `why` says why it ended, and is empty while it runs and where it
    finished. `validations` are those with a finite bound."""

    name: str
    settings: Mapping[str, Any]
    state: State
    why: str
    validations: tuple[Validation, ...]

    @property
    def arm(self) -> dict[str, Any]:
        """The settings without the seed."""
        return {key: value for key, value in self.settings.items() if key != SEED}

    @property
    def step(self) -> int:
        """That of the last validation, 0 before the first."""
        return self.validations[-1].step if self.validations else 0

    @property
    def bound(self) -> float:
        """That of the last validation, which there must be."""
        return self.validations[-1].bound


@dataclass(frozen=True, kw_only=True)
class _Record:
    settings: dict[str, Any]
    state: State
    why: str


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The trials in a folder. Names are numbered."""

    folder: Folder

    def all(self) -> list[Trial]:
        """In order of their numbers."""
        return [self.read(f"trial-{number:03d}") for number in sorted(self._numbers())]

    def free(self) -> int:
        """The least number that no trial has: that of one which somebody removed, or the next."""
        taken = self._numbers()
        return next(number for number in count() if number not in taken)

    def read(self, name: str) -> Trial:
        fix = "Remove the file and the folder beside it; the search proposes another trial"
        record: _Record = documents.load(self.folder, f"{name}.json", _Record, fix)
        run = self.folder / name
        told = [row for row in journal.read(run) if {BOUND, *PARTS} <= row.keys()]
        finite = [row for row in told if math.isfinite(row[BOUND])]
        state, why = record.state, record.why
        if run.exists(RESULT):
            state, why = "finished", ""
            if not finite or finite[-1] is not told[-1]:
                state, why = "failed", "it has no finite bound at its end"
        return Trial(
            name=name,
            settings=record.settings,
            state=state,
            why=why,
            validations=tuple(
                Validation(int(row["step"]), row[BOUND], *(row[part] for part in PARTS))
                for row in finite
            ),
        )

    def add(self, number: int, settings: Mapping[str, Any]) -> str:
        """Record a trial before it begins; its name."""
        name = f"trial-{number:03d}"
        self._write(name, settings, "running", "")
        return name

    def end(self, name: str, state: State, why: str) -> None:
        """Record the state of a trial and the reason for it."""
        self._write(name, self.read(name).settings, state, why)

    def _numbers(self) -> set[int]:
        found = (re.fullmatch(r"trial-([0-9]{3,})\.json", name) for name in self.folder.names())
        return {int(match[1]) for match in found if match}

    def _write(self, name: str, settings: Mapping[str, Any], state: State, why: str) -> None:
        record = {"settings": dict(settings), "state": state, "why": why}
        self.folder.write_bytes(f"{name}.json", json.dumps(record, indent=1).encode())
