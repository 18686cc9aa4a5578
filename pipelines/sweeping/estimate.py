"""What a sweep would take, before it begins."""

from __future__ import annotations

import statistics
from typing import Any

from infra import journal
from infra.shards import read_manifest
from infra.storage import Folder
from pipelines import finetune
from pipelines.sweeping.search import OneAtATime
from pipelines.sweeping.settings import TRIALS, SweepConfig
from pipelines.sweeping.trials import Trials

SPEED = "speed/tokens_per_s"


def plan(config: SweepConfig) -> dict[str, Any]:
    """The plan of `--dry-run`. Hours are those of running one trial after the other."""
    count, steps = config.search.count(config.space), config.finetune.train.steps
    one = finetune.dry_run(config.trial("trial", {}))
    trials = count * expected_steps(config) / steps
    speed, source = _speed(config)
    workers = config.finetune.workers
    paths = config.second.paths.values() if config.second else ()
    length = read_manifest(config.data).length
    return {
        "run": config.folder.url,
        "trials": count,
        "search": config.search.kind,
        **_repeats(config),
        "workers_per_trial": workers.count,
        **{f"{key.lower()}_per_worker": value for key, value in workers.resources.items()},
        "steps_per_trial_at_most": steps,
        "steps_per_trial_expected": round(expected_steps(config)),
        "tokens_at_most": count * one["tokens"],
        "tokens_expected": round(trials * one["tokens"]),
        "tokens_per_s": speed and round(speed),
        "tokens_per_s_of": source,
        "hours_expected": speed and round(trials * one["tokens"] / speed / 3600, 3),
        "h100_hours_at_40_percent": round(trials * one["h100_hours_at_40_percent"], 4),
        "checkpoint_bytes": one["checkpoint_bytes"],
        "second_level_walks_per_trial": sum(len(path.walks(length)) for path in paths),
    }


def _repeats(config: SweepConfig) -> dict[str, int]:
    if not isinstance(config.search, OneAtATime):
        return {}
    return {"arms": len(config.search.named(config.space)), "repeats": config.search.repeats}


def expected_steps(config: SweepConfig) -> float:
    """The mean steps of a trial, if each rung lets 1 / `reduction` of the trials go on."""
    steps, asha = config.finetune.train.steps, config.asha
    ends = [*(asha.rungs(steps) if asha else ()), steps]
    reduction = asha.reduction if asha else 1
    stretches = zip([0, *ends], ends, strict=False)
    return sum((end - begin) / reduction**nth for nth, (begin, end) in enumerate(stretches))


def _speed(config: SweepConfig) -> tuple[float | None, str]:
    """Tokens per second, measured in a trial or in the run to start from, and its address."""
    trials = config.folder / TRIALS
    folders = [trials / trial.name for trial in Trials(folder=trials).all()]
    if "/" in config.finetune.init and not config.finetune.init.startswith("models:"):
        folders.append(Folder.at(config.finetune.init))
    for folder in folders:
        speeds = [row[SPEED] for row in journal.read(folder) if SPEED in row]
        if speeds:
            return statistics.median(speeds), folder.url
    return None, "nothing measured yet"
