"""Put models side by side on held-out text: likelihood, error by state, calibration, and what
they write along every path at every budget; and let the best be the champion.

    python pipelines/evaluate.py quickstart
    python pipelines/evaluate.py owt models.mdlm=s3://bucket/mdlm models.dsl=models:/dsl@candidate

A model is anything that `finetune` takes as `init`, of any kind: masked, autoregressive or DSL.
All are asked about the same rows with the same noise; the unigram stands beside them as the floor
and held-out text as what there is to reach. An evaluation that was interrupted goes on where it
was; what has been drawn is never drawn again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from infra import tracking
from infra.lease import Held
from infra.storage import Folder
from pipelines import runs, verb
from pipelines.evaluation import engine, held_out, preparation, promotion
from pipelines.evaluation.pages import report
from pipelines.evaluation.settings import EvaluateConfig
from pipelines.evaluation.subjects import Origin
from pipelines.evaluation.workspace import MODELS
from pipelines.report import Report, markdown
from pipelines.runs import RESULT, say

SHOWN = 300  # characters of a text in the terminal


def plan(config: EvaluateConfig) -> dict[str, Any]:
    """What would be asked, for `--dry-run`."""
    manifest = held_out.require(config.data, config.split, config.held_out_rows)
    walks = [walk for entry in config.paths.values() for walk in entry.walks(manifest.length)]
    texts = config.samples.rows * config.samples.repeats
    return {
        "run": (Folder.at(config.root) / config.name).url,
        "models": ", ".join(f"{name}: {address}" for name, address in config.models.items()),
        "split": f"{config.split}, {manifest.rows(config.split)} rows of {manifest.length} tokens",
        "likelihood_rows": config.likelihood.rows,
        "texts_per_model": len(walks) * texts,
        "calls_per_text_on_all_paths": sum(budget for _, budget in walks),
        "tokens_per_model": sum(budget for _, budget in walks) * texts * manifest.length,
        "processes": config.workers.count,
    }


def execute(config: EvaluateConfig) -> dict[str, Any]:
    with runs.opened(config, "evaluate") as held:
        return _execute(config, held)


def _execute(config: EvaluateConfig, held: Held) -> dict[str, Any]:
    began, folder = time.monotonic(), held.run
    uri = tracking.locate(config.tracking, config.root)
    origins = preparation.origins(config, folder, uri)
    if folder.exists(RESULT):
        return _finished(folder, origins)
    rows = preparation.rows(config)
    with runs.beginning(folder, config, "evaluate"):
        survey = preparation.prepare(config, folder, origins, rows, uri)
        handle = runs.start(config, "evaluate", rows.manifest, _lineage(origins))
    say(f"run {folder.url}; metrics: {tracking.page(handle)}")
    with runs.ending(handle):
        costs = engine.measure(survey)
        held.lease.confirm()
        decision = promotion.decide(survey, folder, origins, uri)
        spent = engine.time_table(costs, wall=time.monotonic() - began, config=config)
        made, metrics = report(survey, decision, spent)
        handle = runs.publish(folder, handle, made.files(), metrics)
    _show(made)
    result = {
        "run": folder.url,
        "run_id": handle.run_id,
        "models": origins,
        "report": folder.url_of("report/report.html"),
        "tables": folder.url_of("report/evaluation.json"),
        "samples": folder.url_of("samples"),
        "metrics": metrics,
    }
    result |= promotion.conclude(config, origins, decision, handle, result["report"])
    say(f"\nreport: {result['report']}\nMLflow: {tracking.page(handle)}")
    folder.write_bytes(RESULT, json.dumps(result).encode())
    (folder / MODELS).remove()
    return result


def _finished(folder: Folder, origins: Mapping[str, Origin]) -> dict[str, Any]:
    """What an earlier evaluation of the very same models found."""
    result = runs.result(folder, "run", "models")
    preparation.require_same(result["models"], origins, folder)
    say(f"{folder.url} is finished; existing=restart would make it anew")
    return result


def _lineage(origins: Mapping[str, Origin]) -> dict[str, str]:
    """Which models were asked, as tags of the run."""
    return {
        f"model.{name}.{key}": str(value)
        for name, origin in origins.items()
        for key, value in origin.items()
        if value
    }


def _show(report: Report) -> None:
    for text in report.texts:
        flat = " ".join(text.text.split())
        say(f"\n{text.heading}: {flat[:SHOWN]}{'…' if len(flat) > SHOWN else ''}")
    for table in report.tables.values():
        say(f"\n{table.title}. {table.note}\n{markdown(table)}")


def main() -> int:
    return verb.run("evaluate", EvaluateConfig, plan=plan, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
