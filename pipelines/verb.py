"""What all verbs share: their command line, their names, and the name of their experiment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from infra import command, tracking
from pipelines.runs import DATA_ERRORS

T = TypeVar("T")
PRESETS = Path(__file__).with_name("presets")
VERBS = ("prepare", "pretrain", "finetune", "sweep", "evaluate", "generate", "benchmark")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(tracking.TrackingConfig):
    """Where runs are shown, by default in the experiment `dsl`."""

    experiment: str = "dsl"


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
