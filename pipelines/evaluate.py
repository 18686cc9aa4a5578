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
from dataclasses import dataclass, replace
from typing import Any

from infra import pool, tracking
from infra.shards import Manifest
from infra.storage import Folder
from pipelines import runs, verb
from pipelines.evaluation import held_out, jobs, preparation, promotion, stages
from pipelines.evaluation.bench import MODELS
from pipelines.evaluation.found import Found
from pipelines.evaluation.pages import report
from pipelines.evaluation.settings import REAL, REFERENCES, UNIGRAM, EvaluateConfig
from pipelines.evaluation.stages import Stage
from pipelines.evaluation.subjects import Origin
from pipelines.evaluation.tables import Tables, figures, time_table
from pipelines.report import Report, markdown
from pipelines.runs import Made, Run, say

SHOWN = 300  # characters of a text in the terminal


def plan(config: EvaluateConfig) -> dict[str, Any]:
    """What would be asked, for `--dry-run`."""
    wanted = {"likelihood.rows": config.likelihood.rows, "samples.rows": config.samples.rows}
    manifest = held_out.require(config.data, config.split, wanted)
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


@dataclass(kw_only=True)
class Evaluation(runs.Task):
    """Measure all models, decide whether the candidate is to be champion, and write the report."""

    config: EvaluateConfig
    verb: str = "evaluate"

    keys = ("run", "models")

    def stands(self, result: Mapping[str, Any]) -> bool:
        folder = Folder.at(self.config.root) / self.config.name
        origins = preparation.origins(self.config, folder, self._uri)
        preparation.require_same(result["models"], origins, folder)
        return True

    def prepare(self, folder: Folder) -> tuple[Manifest, Mapping[str, str]]:
        config, self.began = self.config, time.monotonic()
        self.origins = preparation.origins(config, folder, self._uri)
        self.rows = preparation.rows(config)
        self.subjects = preparation.prepare(config, folder, self.origins, self.rows, self._uri)
        self.found = preparation.found(config, folder, self.subjects, self.rows)
        return self.rows.manifest, _lineage(self.origins)

    def work(self, run: Run) -> None:
        self.spent = _measure(self.config, self.found)

    def conclude(self, run: Run) -> Made:
        config, folder = self.config, run.folder
        self.decision = promotion.decide(config, folder, self.found, self.origins, self._uri)
        tables = Tables(found=self.found, held_out=self.rows, subjects=self.subjects)
        spent = time_table(self.spent, wall=time.monotonic() - self.began, config=config)
        made = report(tables, self.decision, spent)
        _show(made)
        result = {
            "models": self.origins,
            "report": folder.url_of("report/report.html"),
            "tables": folder.url_of("report/evaluation.json"),
            "samples": folder.url_of("samples"),
            "metrics": figures(made.tables),
        }
        return Made(result, made.files())

    def register(self, run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
        page, handle = result["report"], run.handle
        found = promotion.conclude(self.config, self.origins, self.decision, handle, page)
        say(f"\nreport: {page}\nMLflow: {tracking.page(handle)}")
        (run.folder / MODELS).remove()
        return found

    @property
    def _uri(self) -> str:
        return tracking.locate(self.config.tracking, self.config.root)


def execute(config: EvaluateConfig) -> dict[str, Any]:
    return runs.carry_out(Evaluation(config=config))


def _measure(config: EvaluateConfig, found: Found) -> list[Stage]:
    """Everything that takes a model, on the pool: what the stages have cost."""
    parts = found.parts
    sources = [UNIGRAM, REAL, REFERENCES, *(cell.name for cell in found.walked)]

    with pool.connected(config.workers):
        asked = jobs.of_models(config, found.kinds, found.walked)
        spent = [stages.run("models", asked, config, parts, config.workers)]
        rows = {source: found.count(source) for source in sources}
        # A few texts are read sooner than a process has started.
        few = sum(rows.values()) <= jobs.TEXTS
        workers = replace(config.workers, count=0) if few else config.workers
        spent.append(stages.run("texts", jobs.of_texts(config, rows), config, parts, workers))
        spent.append(stages.run("corpora", jobs.of_corpora(config, rows), config, parts, workers))
    return spent


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
