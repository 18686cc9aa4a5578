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
import statistics
import sys
from typing import Any

import yaml

from infra import journal, tracking
from infra.config import to_tree
from infra.shards import read_manifest
from infra.storage import Folder
from infra.tracking import RunHandle
from pipelines import finetune, models, runs, verb
from pipelines.report import Report, markdown
from pipelines.runs import RESULT, say
from pipelines.sweeping import pages, second
from pipelines.sweeping.second import Walk
from pipelines.sweeping.settings import TRIALS, SweepConfig
from pipelines.sweeping.trials import Trial, Trials

PRESET = "best.yaml"
SPEED = "speed/tokens_per_s"
# What may differ when a sweep is continued.
FREE = ("existing", "register", "concurrent", "tracking.", "finetune.workers.cluster.")


def plan(config: SweepConfig) -> dict[str, Any]:
    """What the trials would take, for `--dry-run`."""
    count, steps = config.search.count(config.space), config.finetune.train.steps
    one = finetune.dry_run(config.trial("trial", {}))
    expected = count * expected_steps(config) / steps
    speed, source = _speed(config)
    workers = config.finetune.workers
    walks = config.second.paths.values() if config.second else ()
    length = read_manifest(config.data).length
    return {
        "run": config.folder.url,
        "trials": count,
        "search": config.search.kind,
        "resources_per_trial": f"{workers.count} x {workers.resources}",
        "steps_per_trial_at_most": steps,
        "tokens_at_most": count * one["tokens"],
        "tokens_expected": round(expected * one["tokens"]),
        "tokens_per_s": speed and round(speed),
        "tokens_per_s_from": source,
        "trial_hours_expected": speed and round(expected * one["tokens"] / speed / 3600, 3),
        "h100_hours_at_40_percent": round(expected * one["h100_hours_at_40_percent"], 4),
        "checkpoint_bytes": one["checkpoint_bytes"],
        "second_level_cells_per_model": sum(len(walk.walks(length)) for walk in walks),
    }


def expected_steps(config: SweepConfig) -> float:
    """Steps of a trial, if a rung lets through the share it is there for."""
    steps, asha = config.finetune.train.steps, config.asha
    ends = [*(asha.rungs(steps) if asha else ()), steps]
    reduction = asha.reduction if asha else 1
    return sum(
        (end - begin) / reduction**nth
        for nth, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
    )


def _speed(config: SweepConfig) -> tuple[float | None, str]:
    """Tokens per second that one run reached: an earlier trial, or the run to start from."""
    folders = [config.folder / TRIALS / t.name for t in Trials(folder=config.folder / TRIALS).all()]
    if "://" not in config.finetune.init and not config.finetune.init.startswith("models:"):
        folders.append(Folder.at(config.finetune.init))
    for folder in folders:
        speeds = [row[SPEED] for row in journal.read(folder) if SPEED in row]
        if speeds:
            return statistics.median(speeds), folder.url
    return None, "nothing measured yet"


def execute(config: SweepConfig) -> dict[str, Any]:
    folder = runs.open_run(config, "sweep", FREE)
    if folder.exists(RESULT):
        say(f"{folder.url} is finished; existing=restart would make it anew")
        return dict(json.loads(folder.read_bytes(RESULT)))
    manifest = read_manifest(config.data)
    handle = runs.start(config, "sweep", manifest, {"parent_model": config.finetune.init})
    say(f"sweep {folder.url}; metrics: {tracking.page(handle)}")
    try:
        from pipelines.sweeping import tuning  # Ray takes seconds to import

        tuning.run(config, handle.run_id)
        trials = Trials(folder=folder / TRIALS).all()
        best = second.ranked(trials)[0]
        found = second.run(config, trials, handle)
        walk = second.best(found.walks, best.name)
        folder.write_bytes(PRESET, _preset(config, best, walk).encode())
        made = pages.report(config, trials, best, found.rows)
        _keep(made, folder / "report", handle)
        result = _result(config, trials, best)
        log = tracking.Logger(tracking.Journal(folder), handle)
        log.log(0, result["metrics"])
        log.close()
    except BaseException as error:
        tracking.finish(handle, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    handle = tracking.finish(handle)
    result |= {"run_id": handle.run_id} | _register(config, best, handle)
    _show(made)
    say(f"\nreport: {result['report']}\npreset: {result['preset']}")
    folder.write_bytes(RESULT, json.dumps(result).encode())
    return result


def _preset(config: SweepConfig, best: Trial, walk: Walk | None) -> str:
    """The recommendation: `finetune` from scratch as the best trial did, `generate` along the path
    on which it wrote best."""
    name = f"{config.name}-best"
    settings = to_tree(config.trial(name, best.settings)) | {
        "root": config.root,
        "register": config.register,
        "tracking": to_tree(config.tracking),
    }
    sections: dict[str, Any] = {"finetune": settings}
    if walk:
        nucleus = walk.cell.nucleus or (config.second and config.second.samples.nucleus)
        sections["generate"] = {
            "model": f"{config.root}/{name}",
            "path": to_tree(walk.cell.walk),
            "budget": walk.cell.budget,
            "nucleus": to_tree(nucleus),
        }
    head = f"# {best.name} of the sweep {config.name}: {best.bound:.4f} nats per token\n"
    return head + yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def _result(config: SweepConfig, trials: list[Trial], best: Trial) -> dict[str, Any]:
    states = [trial.state for trial in trials]
    ends = {trial.name: trial.why for trial in trials if trial.state in ("failed", "lost")}
    counts = {f"trials/{state}": states.count(state) for state in dict.fromkeys(states)}
    return {
        "run": config.folder.url,
        "best": best.name,
        "settings": dict(best.settings),
        "model": (config.folder / TRIALS / best.name / "model").url,
        "preset": config.folder.url_of(PRESET),
        "report": config.folder.url_of("report/report.html"),
        "failed": ends,
        "metrics": {"trials": len(trials), **counts, "best/bound": best.bound},
    }


def _keep(report: Report, folder: Folder, handle: RunHandle) -> None:
    for name, content in report.files().items():
        folder.write_bytes(name, content)
    with runs.on_disk(folder) as place:
        tracking.log_artifacts(handle, place)


def _register(config: SweepConfig, best: Trial, handle: RunHandle) -> dict[str, Any]:
    """The best trial's model as a candidate, with the way back to the sweep."""
    run = config.folder / TRIALS / best.name
    made_by = tracking.opened(run.url)
    if not config.register or not made_by or made_by.run_id is None:
        return {}
    tags = {
        "objective": "dsl",
        "sweep": config.folder.url,
        "sweep_run": handle.run_id or "",
        "trial": best.name,
    }
    version = models.register(run / "model", config.register, made_by, tags=tags)
    return {"model_uri": version.uri, "alias_uri": version.alias_uri("candidate")}


def _show(report: Report) -> None:
    for table in report.tables.values():
        say(f"\n{table.title}. {table.note}\n{markdown(table)}")


def main() -> int:
    return verb.run("sweep", SweepConfig, plan=plan, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
