"""The command line that all verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from infra import command
from pipelines.runs import DATA_ERRORS

T = TypeVar("T")
PRESETS = Path(__file__).with_name("presets")


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
        presets=PRESETS,
        doc=doc or "",
        data_errors=DATA_ERRORS,
    )
