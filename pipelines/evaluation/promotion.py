"""The champion: who holds the alias, who is compared with it, and what it takes to move it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from infra import documents, registry
from infra.console import say
from infra.storage import Folder
from infra.tracking import RunHandle
from pipelines.evaluation import gate
from pipelines.evaluation.cells import CHAMPION, UNIGRAM
from pipelines.evaluation.gate import Decision
from pipelines.evaluation.settings import EvaluateConfig
from pipelines.evaluation.subjects import Origin
from pipelines.evaluation.survey import Survey

DECISION = "decision.json"


def decided(folder: Folder) -> Decision | None:
    """What an attempt at this evaluation has decided, and may have acted on; DataError for a file
    that is no decision."""
    fix = "Remove the file; the same command decides anew"
    return documents.load(folder, DECISION, Decision, fix) if folder.exists(DECISION) else None


def decide(survey: Survey, origins: Mapping[str, Origin], uri: str) -> Decision | None:
    """Whether the candidate is to be champion; None without a gate, or where it is already.

    It is written down before the alias moves: afterwards there would be no other champion to
    compare with.
    """
    config, folder = survey.config, survey.config.folder
    if not config.gate:
        return None
    if before := decided(folder):
        return before
    candidate = origins[config.gate.model]
    holder = registry.get_alias(candidate["name"], CHAMPION, uri)
    if holder and holder.uri == candidate["version"]:
        say(f"{candidate['version']} is the champion already")
        return None
    made = gate.compare(
        survey,
        config.gate,
        candidate=config.gate.model,
        # As long as there is no champion, the floor that any model must lie above.
        other=CHAMPION if CHAMPION in origins else UNIGRAM,
        seed=config.seed,
    )
    folder.write_bytes(DECISION, json.dumps(asdict(made), indent=1).encode())
    return made


def conclude(
    config: EvaluateConfig,
    origins: Mapping[str, Origin],
    decision: Decision | None,
    handle: RunHandle,
    report: str,
) -> dict[str, Any]:
    """Tag every registered model with its evaluation, and move the alias if that was decided.

    Returns the entries for the result. The alias stays where it is if it has moved since the
    evaluation began.
    """
    for origin in origins.values():
        if "version" in origin:
            tags = {"evaluation": handle.run_id or "", "evaluation_report": report}
            registry.tag(origin["version"], tags, handle.uri)
    if not config.gate or not decision:
        return {}
    candidate = origins[config.gate.model]
    compared = origins[CHAMPION]["version"] if CHAMPION in origins else None
    holder = registry.get_alias(candidate["name"], CHAMPION, handle.uri)
    now = holder.uri if holder else None
    moved = decision.accepted and now in (compared, candidate["version"])
    if moved and now != candidate["version"]:
        registry.set_alias(candidate["version"], CHAMPION, handle.uri)
    say(decision.why)
    if decision.accepted and not moved:
        say("The alias has moved while this ran, so it stays where it is: evaluate again")
    return {"champion": {"moved": moved, "why": decision.why}}


def require(survey: Survey) -> None:
    """ConfigError for a gate that asks for what is not measured of both models, before anything
    is. Of the unigram, which stands for a champion where there is none, all is measured."""
    if wanted := survey.config.gate:
        for metric in (wanted.metric, *wanted.guards):
            for model in (wanted.model, CHAMPION):
                if model in survey.kinds:
                    metric.require(survey, model)
