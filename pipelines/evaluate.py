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

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra import shards, tracking
from infra.console import say
from infra.storage import Folder
from pipelines import runs, verb
from pipelines.evaluation import engine, held_out, preparation, promotion
from pipelines.evaluation.cells import cells
from pipelines.evaluation.pages import report
from pipelines.evaluation.settings import EvaluateConfig
from pipelines.evaluation.subjects import Origin
from pipelines.evaluation.survey import further
from pipelines.evaluation.workspace import MODELS
from pipelines.runs import Dataset, Made, Run


def plan(config: EvaluateConfig) -> dict[str, Any]:
    """What would be asked, for `--dry-run`."""
    manifest = held_out.require(config.data, config.split, config.held_out_rows)
    walks = cells(["any"], config.paths, manifest.length)
    texts = dict.fromkeys(walks, config.samples.rows * config.samples.repeats)
    texts |= further(config, walks)
    return {
        "run": config.folder.url,
        "models": ", ".join(f"{name}: {address}" for name, address in config.models.items()),
        "split": f"{config.split}, {manifest.rows(config.split)} rows of {manifest.length} tokens",
        "likelihood_rows": config.likelihood.rows,
        "texts_per_model": sum(texts.values()),
        "calls_per_text_on_all_paths": sum(cell.budget for cell in walks),
        "tokens_per_model": sum(cell.budget * rows for cell, rows in texts.items())
        * manifest.length,
        "processes": config.workers.count,
    }


@dataclass(kw_only=True)
class EvaluationTask(runs.Task):
    """Measure all models, decide whether the candidate is to be champion, and write the report."""

    config: EvaluateConfig
    verb: str = "evaluate"

    keys = ("run", "models")

    def stands(self, result: Mapping[str, Any]) -> bool:
        origins = preparation.origins(self.config, self._uri)
        preparation.require_same(result["models"], origins, self.config.folder)
        manifest = shards.read_manifest(self.config.data)
        tracking.require_same_data(result.get("data"), runs.dataset({self.config.data: manifest}))
        return True

    def prepare(self, folder: Folder) -> tuple[Dataset, Mapping[str, str]]:
        config, self.began = self.config, time.monotonic()
        self.origins = preparation.origins(config, self._uri)
        rows = preparation.rows(config)
        self.survey = preparation.prepare(config, self.origins, rows, self._uri)
        self.data = runs.dataset({config.data: rows.manifest})
        return self.data, _lineage(self.origins)

    def work(self, run: Run) -> None:
        self.costs = engine.measure(self.survey)

    def conclude(self, run: Run) -> Made:
        folder = run.folder
        self.decision = promotion.decide(self.survey, self.origins, self._uri)
        wall = time.monotonic() - self.began
        spent = engine.time_table(self.costs, wall=wall, config=self.config)
        made, metrics = report(self.survey, self.decision, spent)
        result = {
            "models": self.origins,
            "data": self.data,
            "report": folder.url_of("report/report.html"),
            "tables": folder.url_of("report/evaluation.json"),
            "samples": folder.url_of("samples"),
            "metrics": metrics,
        }
        return Made(result, made.files())

    def register(self, run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
        page, handle = result["report"], run.handle
        found = promotion.conclude(self.config, self.origins, self.decision, handle, page)
        say(f"report: {page}; metrics: {tracking.page(handle)}")
        (run.folder / MODELS).remove()
        return found

    @property
    def _uri(self) -> str:
        return tracking.locate(self.config.tracking, self.config.root)


def execute(config: EvaluateConfig) -> dict[str, Any]:
    return runs.carry_out(EvaluationTask(config=config))


def _lineage(origins: Mapping[str, Origin]) -> dict[str, str]:
    """Which models were asked, as tags of the run."""
    return {
        f"model.{name}.{key}": str(value)
        for name, origin in origins.items()
        for key, value in origin.items()
        if value
    }


def main() -> int:
    return verb.run("evaluate", EvaluateConfig, plan=plan, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
