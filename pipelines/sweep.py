"""Try settings of `finetune` side by side, stop the bad ones early, and recommend the best.

    python pipelines/sweep.py quickstart
    python pipelines/sweep.py owt finetune.init=models:/mdlm-owt@candidate search.trials=64

Two levels: trials are trained, as `space`, `search` and `asha` say; the best of them then walk
the paths of `second`, which needs no training. Whatever is interrupted goes on where it was with
the same command: no trial is begun twice, no text drawn twice. `best.yaml` in the run directory is
a preset of the recommendation.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra.console import say
from infra.shards import Manifest, read_manifest
from infra.storage import Folder
from pipelines import runs, verb
from pipelines.report import markdown
from pipelines.runs import Made, Run
from pipelines.sweeping import pages, recommendation, second
from pipelines.sweeping.arms import ranked
from pipelines.sweeping.estimate import plan
from pipelines.sweeping.settings import TRIALS, SweepConfig
from pipelines.sweeping.trials import Trials

PRESET = "best.yaml"


@dataclass(kw_only=True)
class Sweep(runs.Task):
    """Train the trials, evaluate the best of them, and recommend one."""

    config: SweepConfig
    verb: str = "sweep"

    free = ("existing", "register", "concurrent", "tracking.", "finetune.workers.cluster.")

    def stands(self, result: Mapping[str, Any]) -> bool:
        name = self.config.register
        return name is None or f"models:/{name}/" in str(result.get("model_uri"))

    def prepare(self, folder: Folder) -> tuple[Manifest, Mapping[str, str]]:
        return read_manifest(self.config.data), {"parent_model": self.config.finetune.init}

    def work(self, run: Run) -> None:
        """Both levels."""
        from pipelines.sweeping import tuning  # Ray takes seconds to import

        tuning.run(self.config, run.handle.run_id)
        self.trials = Trials(folder=run.folder / TRIALS).all()
        self.arms = ranked(self.trials)
        self.second = second.run(self.config, self.arms, run.handle)

    def conclude(self, run: Run) -> Made:
        config, folder, arms = self.config, run.folder, self.arms
        best = arms[0]
        walk = second.best(self.second.walks, best.trial.name)
        folder.write_bytes(PRESET, recommendation.preset(config, best, walk).encode())
        made = pages.report(config, self.trials, arms, self.second.rows)
        for table in made.tables.values():
            say(f"\n{table.title}. {table.note}\n{markdown(table)}")
        states = [trial.state for trial in self.trials]
        counts = {f"trials/{state}": states.count(state) for state in dict.fromkeys(states)}
        result = {
            "best": best.trial.name,
            "settings": best.settings,
            "model": (folder / TRIALS / best.trial.name / "model").url,
            "preset": folder.url_of(PRESET),
            "report": folder.url_of("report/report.html"),
            "failed": {t.name: t.why for t in self.trials if t.state in ("failed", "lost")},
            "metrics": {"trials": len(states), **counts, "best/bound": best.bound},
        }
        say(f"\nreport: {result['report']}\npreset: {result['preset']}")
        return Made(result, made.files())

    def register(self, run: Run, result: Mapping[str, Any]) -> dict[str, Any] | None:
        return recommendation.register(self.config, self.arms[0].trial, run.handle)


def execute(config: SweepConfig) -> dict[str, Any]:
    return runs.carry_out(Sweep(config=config))


def main() -> int:
    return verb.run("sweep", SweepConfig, plan=plan, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
