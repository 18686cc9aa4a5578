"""Which texts an evaluation draws: of which models, along which paths, at which budgets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsl.paths import AnyPath, Hybrid, choose
from dsl.truncation import Nucleus

# What stands beside the models: independent tokens, held-out text, and more of it to compare with.
UNIGRAM, REAL, REFERENCES = "unigram", "real", "references"
CHAMPION = "champion"


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """A path, and the budgets in denoiser calls to walk it with.

    No budgets: the one that `generate` would take, which is the sum of a hybrid's split and one
    call a token for any other path. A hybrid may be walked with several `splits` instead, each
    (continuous calls, endpoint calls), which then stand for the one in its path. `nucleus` is for
    this path alone; otherwise that of all samples.
    """

    path: AnyPath
    budgets: tuple[int, ...] = ()
    splits: tuple[tuple[int, int], ...] = ()
    nucleus: Nucleus | None = None

    def __post_init__(self) -> None:
        if self.splits and not isinstance(self.path, Hybrid):
            raise ValueError(f"splits are for hybrid paths, and this is {self.path.kind}")
        if self.splits and self.budgets:
            raise ValueError("a split is a budget already: give budgets or splits, not both")
        require_distinct("budgets", self.budgets)
        require_distinct("splits", self.splits)
        for budget in self.budgets:
            if budget < 1:
                raise ValueError(f"budgets must be at least one call, got {budget}")
        self.walks(1)  # refuses another sum than the split's

    def walks(self, length: int) -> tuple[tuple[AnyPath, int], ...]:
        """Every path with its budget, for texts of ``length`` tokens."""
        if isinstance(self.path, Hybrid) and self.splits:
            return tuple((replace(self.path, split=split), sum(split)) for split in self.splits)
        budgets = self.budgets or (None,)
        return tuple(choose(self.path, b, length=length, causal=False) for b in budgets)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model on one path at one budget: a row of the table of texts, unless it has a temperature
    of its own.

    nucleus, temperature: of these texts alone; None for those of all samples.
    """

    model: str
    path: str  # its name in the configuration
    walk: AnyPath
    budget: int
    nucleus: Nucleus | None = None
    temperature: float | None = None

    @property
    def name(self) -> str:
        """Tells cells apart, in folders and figures."""
        calls = str(self.budget) if self.split is None else "{}+{}".format(*self.split)
        name = f"{self.model}-{self.path}-{calls}"
        if self.temperature is None:
            return name
        cut = f"-p{self.nucleus.p}" if self.nucleus else ""
        return f"{name}-t{self.temperature}{cut}"

    @property
    def split(self) -> tuple[int, int] | None:
        """A hybrid's calls on its first path and on its second."""
        return self.walk.split if isinstance(self.walk, Hybrid) else None


def labels(cell: Cell) -> dict[str, Any]:
    """What tells the row of a cell from others."""
    split = {"split": list(cell.split)} if cell.split else {}
    return {"model": cell.model, "path": cell.path, **split, "budget": cell.budget}


def cells(models: Iterable[str], paths: Mapping[str, PathConfig], length: int) -> list[Cell]:
    """Every model on every path, walkable or not."""
    return [
        Cell(model=model, path=name, walk=walk, budget=budget, nucleus=entry.nucleus)
        for model in models
        for name, entry in paths.items()
        for walk, budget in entry.walks(length)
    ]


def longest(walked: Iterable[Cell]) -> list[Cell]:
    """Of each model on each path the cell of most calls: the one to watch step by step."""
    by_path: dict[tuple[str, str], Cell] = {}
    for cell in walked:
        known = by_path.setdefault((cell.model, cell.path), cell)
        if cell.budget > known.budget:
            by_path[cell.model, cell.path] = cell
    return list(by_path.values())


def require_distinct(name: str, values: Iterable[Any]) -> None:
    """ValueError for two values of a setting that names of parts do not tell apart."""
    said = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    if twice := [value for value in said if said.count(value) > 1]:
        raise ValueError(f"{name} holds {twice[0]} twice")
