"""What all verbs share: their command line, their names, and the name of their experiment."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from infra import command, tracking
from infra.storage import Folder
from pipelines.models import DATA_ERRORS

T = TypeVar("T")
PRESETS = Path(__file__).with_name("presets")
VERBS = (
    "prepare", "pretrain", "finetune", "sweep", "evaluate", "generate", "export", "benchmark",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(tracking.TrackingConfig):
    """Where runs are shown, by default in the experiment `dsl`."""

    experiment: str = "dsl"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The run directory of a verb: `name` in `root`. If it exists, `existing` says whether to go on
    from there or to wipe it."""

    name: str
    root: str = "runs"
    existing: Literal["resume", "restart"] = "resume"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise ValueError(f"name must be letters, digits, _ . - only, got {self.name!r}")

    @property
    def folder(self) -> Folder:
        return Folder.at(self.root) / self.name


def require_model_name(name: str | None) -> None:
    """ValueError for a name under which the registry would take no model, or not find it again."""
    if name is not None and not re.fullmatch("[^/:@']+", name):
        raise ValueError(f"register must be a name without / : @ ', got {name!r}")


def run(
    verb: str,
    config_type: type[T],
    *,
    plan: Callable[[T], dict[str, Any]],
    execute: Callable[[T], dict[str, Any]],
    doc: str | None,
) -> int:
    """Run a verb from the command line; its exit code."""
    return command.run(
        verb,
        config_type,
        plan=plan,
        execute=execute,
        verbs=VERBS,
        presets=PRESETS,
        doc=doc or "",
        data_errors=DATA_ERRORS,
    )
