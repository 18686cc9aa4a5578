"""What a sweep recommends: the best trial's settings, as a preset and as a registered model."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import yaml

from infra import tracking
from infra.config import to_tree
from infra.errors import DataError, InfraError
from infra.tracking import RunHandle
from pipelines import runs
from pipelines.kinds import DSL
from pipelines.sweeping.arms import Arm
from pipelines.sweeping.second import Walk
from pipelines.sweeping.settings import TRIALS, SweepConfig
from pipelines.sweeping.trials import Trial


def preset(config: SweepConfig, best: Arm, walk: Walk | None) -> str:
    """`finetune` as the trial did that stands for the best arm, under a name of its own;
    `generate` along the walk, at the temperature of its headline where it has one."""
    name = f"{config.name}-best"
    sections: dict[str, Any] = {
        "finetune": to_tree(config.trial(name, best.trial.settings))
        | {
            "root": config.root,
            "register": config.register,
            "tracking": to_tree(config.tracking),
        }
    }
    if walk and config.second:
        samples = config.second.samples
        sections["generate"] = {
            "model": f"{config.root.rstrip('/')}/{name}",
            "path": to_tree(walk.cell.walk),
            "budget": walk.cell.budget,
            "temperature": walk.row.get("at", samples.temperature),
            "nucleus": to_tree(walk.cell.nucleus or samples.nucleus),
            "precision": config.second.precision,
            "trust_remote_code": config.finetune.trust_remote_code,
            "root": config.root,
            "tracking": to_tree(config.tracking),
        }
    of = f" (mean of {len(best.trials)} repeats)" if len(best.trials) > 1 else ""
    head = f"# {best.trial.name} of the sweep {config.name}: {best.bound:.4f} nats per token{of}\n"
    return head + yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def register(config: SweepConfig, best: Trial, sweep: RunHandle) -> dict[str, Any] | None:
    """The best trial's model as a candidate, with the way back to the sweep, if that is asked
    for; None where no server answers, as `Task.register` has it.

    A trial whose MLflow run could not be made while it trained gets it now.
    """
    trial = config.folder / TRIALS / best.name
    handle = tracking.opened(trial.url)
    if handle is None:
        raise DataError(trial.url, "has no run.json", "Remove the trial; the sweep repeats it")
    if config.register and handle.run_id is None:
        with suppress(InfraError):
            handle = tracking.replay(trial.url)
    tags = {
        "objective": DSL.name,
        "sweep": config.folder.url,
        "sweep_run": sweep.run_id or "",
        "trial": best.name,
    }
    return runs.register(trial / "model", config.register, handle, tags)
