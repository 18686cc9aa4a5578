"""The champion: who holds the alias, who is compared with it, and what it takes to move it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra import registry
from infra.tracking import RunHandle
from pipelines.evaluation import gate
from pipelines.evaluation.found import Found
from pipelines.evaluation.gate import Decision
from pipelines.evaluation.settings import CHAMPION, UNIGRAM, EvaluateConfig
from pipelines.evaluation.subjects import Origin
from pipelines.runs import say


def other(config: EvaluateConfig, origins: Mapping[str, Origin]) -> str:
    """Whom the candidate is compared with: the champion or, as long as there is none, the floor
    that any model must lie above."""
    return CHAMPION if CHAMPION in origins else UNIGRAM


def decide(
    config: EvaluateConfig, found: Found, origins: Mapping[str, Origin], uri: str
) -> Decision | None:
    """Whether the candidate is to be champion; None where nobody asked, or where it is already."""
    if not config.gate:
        return None
    candidate = origins[config.gate.model]
    holder = registry.get_alias(candidate["name"], CHAMPION, uri)
    if holder and holder.uri == candidate["version"]:
        say(f"{candidate['version']} is the champion already")
        return None
    return gate.compare(
        found,
        config.gate,
        candidate=config.gate.model,
        other=other(config, origins),
        seed=config.seed,
    )


def conclude(
    config: EvaluateConfig,
    origins: Mapping[str, Origin],
    decision: Decision | None,
    handle: RunHandle,
    report: str,
) -> dict[str, Any]:
    """Link every registered model to its evaluation, and move the alias if that was decided.

    What of it belongs into the result. The alias stays where somebody has moved it meanwhile.
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
    moved = decision.accepted and (holder.uri if holder else None) == compared
    if moved:
        registry.set_alias(candidate["version"], CHAMPION, handle.uri)
    say(f"\n{decision.why}")
    if decision.accepted and not moved:
        say("The alias has moved while this ran, so it stays where it is: evaluate again")
    return {"champion": {"moved": moved, "why": decision.why}}


def require(config: EvaluateConfig, found: Found) -> None:
    """ConfigError for a gate that asks for what is not measured, before anything is."""
    if not config.gate:
        return
    for metric in (config.gate.metric, *config.gate.guards):
        metric.require(found, config.gate.model)
