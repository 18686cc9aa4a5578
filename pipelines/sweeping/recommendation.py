"""What a sweep recommends: the best trial's settings, as a preset and as a registered model."""

from __future__ import annotations

from typing import Any

import yaml

from infra import tracking
from infra.config import to_tree
from infra.tracking import RunHandle
from pipelines import models
from pipelines.kinds import DSL
from pipelines.sweeping.arms import Arm
from pipelines.sweeping.second import Walk
from pipelines.sweeping.settings import TRIALS, SweepConfig
from pipelines.sweeping.trials import Trial


def preset(config: SweepConfig, best: Arm, walk: Walk | None) -> str:
    """`finetune` as the trial did that stands for the best arm, under a name of its own;
    `generate` along the walk."""
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
            "model": f"{config.root}/{name}",
            "path": to_tree(walk.cell.walk),
            "budget": walk.cell.budget,
            "temperature": samples.temperature,
            "nucleus": to_tree(walk.cell.nucleus or samples.nucleus),
            "root": config.root,
            "tracking": to_tree(config.tracking),
        }
    of = f" (mean of {len(best.trials)} repeats)" if len(best.trials) > 1 else ""
    head = f"# {best.trial.name} of the sweep {config.name}: {best.bound:.4f} nats per token{of}\n"
    return head + yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def register(config: SweepConfig, best: Trial, sweep: RunHandle) -> dict[str, Any]:
    """The best trial's model as a candidate, with the way back to the sweep, if it is asked for
    and a server is there."""
    run = config.folder / TRIALS / best.name
    handle = tracking.opened(run.url)
    if not config.register or handle is None or handle.run_id is None:
        return {}
    tags = {
        "objective": DSL.name,
        "sweep": config.folder.url,
        "sweep_run": sweep.run_id or "",
        "trial": best.name,
    }
    version = models.register(run / "model", config.register, handle, tags=tags)
    return {"model_uri": version.uri, "alias_uri": version.alias_uri("candidate")}
