"""Try settings of `finetune` side by side, stop the bad ones early, and recommend the best.

    python pipelines/sweep.py quickstart
    python pipelines/sweep.py owt finetune.init=models:/mdlm-owt@candidate search.trials=64

Two levels: trials are trained, as `space`, `search` and `asha` say; the best of them then walk
the paths of `second`, which needs no training. Whatever is interrupted goes on where it was with
the same command: no trial is begun twice, no text drawn twice. `best.yaml` in the run directory is
a preset of the recommendation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from infra import tracking
from infra.lease import Held
from infra.shards import read_manifest
from infra.storage import Folder
from infra.tracking import RunHandle
from pipelines import runs, verb
from pipelines.report import Report, markdown
from pipelines.runs import RESULT, say
from pipelines.sweeping import pages, recommendation, second
from pipelines.sweeping.arms import Arm, ranked
from pipelines.sweeping.estimate import plan
from pipelines.sweeping.settings import TRIALS, SweepConfig
from pipelines.sweeping.trials import Trial, Trials

PRESET = "best.yaml"
# What may differ when a sweep is continued.
FREE = ("existing", "register", "concurrent", "tracking.", "finetune.workers.cluster.")


def execute(config: SweepConfig) -> dict[str, Any]:
    with runs.opened(config, "sweep", FREE) as held:
        return _execute(config, held)


def _execute(config: SweepConfig, held: Held) -> dict[str, Any]:
    folder = held.run
    if folder.exists(RESULT):
        say(f"{folder.url} is finished; existing=restart would make it anew")
        return runs.result(folder, "run")
    manifest = read_manifest(config.data)
    with runs.beginning(folder, config, "sweep"):
        handle = runs.start(config, "sweep", manifest, {"parent_model": config.finetune.init})
    say(f"sweep {folder.url}; metrics: {tracking.page(handle)}")
    with runs.ending(handle):
        trials, made = _levels(config, folder, handle)
        held.lease.confirm()
        best = ranked(trials)[0]
        result = _result(config, trials, best)
        log = tracking.Logger(tracking.Journal(folder), handle)
        log.log(0, result["metrics"])
        log.close()
        _keep(made, folder / "report", handle)
    handle = tracking.finish(handle)
    result |= {"run_id": handle.run_id}
    result |= recommendation.register(config, best.trial, handle)
    for table in made.tables.values():
        say(f"\n{table.title}. {table.note}\n{markdown(table)}")
    say(f"\nreport: {result['report']}\npreset: {result['preset']}")
    folder.write_bytes(RESULT, json.dumps(result).encode())
    return result


def _levels(
    config: SweepConfig, folder: Folder, handle: RunHandle
) -> tuple[Sequence[Trial], Report]:
    """Both levels, to their end; writes the preset."""
    from pipelines.sweeping import tuning  # Ray takes seconds to import

    tuning.run(config, handle.run_id)
    trials = Trials(folder=folder / TRIALS).all()
    arms = ranked(trials)
    found = second.run(config, arms, handle)
    walk = second.best(found.walks, arms[0].trial.name)
    folder.write_bytes(PRESET, recommendation.preset(config, arms[0], walk).encode())
    return trials, pages.report(config, trials, arms, found.rows)


def _result(config: SweepConfig, trials: Sequence[Trial], best: Arm) -> dict[str, Any]:
    folder = config.folder
    states = [trial.state for trial in trials]
    counts = {f"trials/{state}": states.count(state) for state in dict.fromkeys(states)}
    return {
        "run": folder.url,
        "best": best.trial.name,
        "settings": best.settings,
        "model": (folder / TRIALS / best.trial.name / "model").url,
        "preset": folder.url_of(PRESET),
        "report": folder.url_of("report/report.html"),
        "failed": {t.name: t.why for t in trials if t.state in ("failed", "lost")},
        "metrics": {"trials": len(trials), **counts, "best/bound": best.bound},
    }


def _keep(report: Report, folder: Folder, handle: RunHandle) -> None:
    for name, content in report.files().items():
        folder.write_bytes(name, content)
    with folder.local() as place:
        tracking.log_artifacts(handle, place)


def main() -> int:
    return verb.run("sweep", SweepConfig, plan=plan, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
