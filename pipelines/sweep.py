"""Try settings of `finetune` side by side, stop the bad ones early, and recommend the best.

    python pipelines/sweep.py quickstart
    python pipelines/sweep.py owt finetune.init=models:/mdlm-owt@candidate search.trials=64

Two levels: trials are trained, as `space`, `search` and `asha` say; the best of them then walk
the paths of `second`, which needs no training. Whatever is interrupted goes on where it was with
the same command: no trial is begun twice, no text drawn twice. `best.yaml` in the run directory is
a preset of the recommendation.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from infra import journal
from infra.config import flatten
from infra.console import say
from infra.shards import read_manifest
from infra.storage import Folder
from pipelines import finetune, runs, verb
from pipelines.report import markdown
from pipelines.runs import Dataset, Made, Run
from pipelines.sweeping import pages, recommendation, second
from pipelines.sweeping.arms import ranked
from pipelines.sweeping.search import OneAtATime
from pipelines.sweeping.settings import TRIALS, SweepConfig
from pipelines.sweeping.trials import Trials

PRESET = "best.yaml"
SPEED = "speed/tokens_per_s"


@dataclass(kw_only=True)
class Sweep(runs.Task):
    """Train the trials, evaluate the best of them, and recommend one."""

    config: SweepConfig
    verb: str = "sweep"

    # What the trials and the second level may change themselves when they are continued, except
    # how a trial's workers compute, which is the same for all of them.
    free = (
        "existing", "register", "concurrent", "tracking.",
        "finetune.workers.cluster.", "finetune.workers.max_failures",
        "finetune.train.checkpoint.", "finetune.train.log_every", "second.workers.",
    )  # fmt: skip

    def stands(self, result: Mapping[str, Any]) -> bool:
        """Not where a trial was lost, which is tried again."""
        name = self.config.register
        registered = name is None or f"models:/{name}/" in str(result.get("model_uri"))
        return registered and not flatten(dict(result)).get("metrics.trials/lost")

    def prepare(self, folder: Folder) -> tuple[Dataset, Mapping[str, str]]:
        config, data = self.config, self.config.data
        if not folder.exists(TRIALS):
            second.require(config)
        tags = {"parent_model": config.finetune.init}
        return runs.dataset({data: read_manifest(data)}), tags

    def work(self, run: Run) -> None:
        """Both levels."""
        from pipelines.sweeping import tuning  # Ray takes seconds to import

        tuning.run(self.config, run.handle.run_id)
        self.trials = Trials(folder=run.folder / TRIALS).all()
        self.arms = ranked(self.trials)
        self.walks = second.run(self.config, self.arms, run.handle)

    def conclude(self, run: Run) -> Made:
        config, folder, arms = self.config, run.folder, self.arms
        best, walk = second.chosen(config.second, arms, self.walks)
        self.best = best.trial
        folder.write_bytes(PRESET, recommendation.preset(config, best, walk).encode())
        by = second.by(config.second, walk)
        rows = [walk.row for walk in self.walks]
        made = pages.report(config, self.trials, arms, best, by, rows)
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
        say(f"\nrecommended: {best.trial.name}, by {by}")
        say(f"report: {result['report']}\npreset: {result['preset']}")
        return Made(result, made.files())

    def register(self, run: Run, result: Mapping[str, Any]) -> dict[str, Any] | None:
        return recommendation.register(self.config, self.best, run.handle)


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
        "h100_hours_at_30_percent": round(trials * one["h100_hours_at_30_percent"], 4),
        "checkpoint_bytes": one["checkpoint_bytes"],
        "second_level_walks_per_trial": sum(len(path.walks(length)) for path in paths),
    }


def _repeats(config: SweepConfig) -> dict[str, int]:
    if not isinstance(config.search, OneAtATime):
        return {}
    return {"arms": len(config.search.named(config.space)), "repeats": config.search.repeats}


def expected_steps(config: SweepConfig) -> float:
    """The mean steps of a trial, if 1 / `reduction` of them go on wherever they are judged."""
    places = [0, *config.judged_at, config.finetune.train.steps]
    reduction = config.asha.reduction if config.asha else 1
    stretches = enumerate(pairwise(places))
    return sum((end - begin) / reduction**nth for nth, (begin, end) in stretches)


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


def execute(config: SweepConfig) -> dict[str, Any]:
    return runs.carry_out(Sweep(config=config))


def main() -> int:
    return verb.run("sweep", SweepConfig, plan=plan, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
