"""Put models side by side on held-out text: likelihood, error by state, and what they write.

    python pipelines/evaluate.py quickstart
    python pipelines/evaluate.py owt models.mdlm=s3://bucket/mdlm models.dsl=models:/dsl@candidate

A model is anything that `finetune` takes as `init`, of any kind: masked, autoregressive or DSL.
All are asked about the same rows with the same noise; the unigram stands beside them as the floor
and held-out text as what there is to reach.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from infra import tracking
from infra.errors import ConfigError
from infra.storage import Folder
from infra.tracking import TrackingConfig
from pipelines import runs, verb
from pipelines.evaluation import held_out, subjects
from pipelines.evaluation.measures import LikelihoodConfig, PathConfig, SamplesConfig, StatesConfig
from pipelines.evaluation.subjects import Origin
from pipelines.evaluation.tables import REAL, UNIGRAM, Evaluation, draw_plots, figures
from pipelines.models import ConverterConfig
from pipelines.report import Report, markdown
from pipelines.runs import RESULT, say

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
SHOWN = 300  # characters of a text in the terminal


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`models` and `paths` go by names of your choice; every model walks every path it can.

    `data` are the shards of `prepare`. At most `corpus_rows` rows of its training split say which
    words there are and how frequent tokens are. `batch` rows at a time share a denoiser call.
    """

    name: str
    data: str
    models: dict[str, str]
    paths: dict[str, PathConfig] = field(default_factory=dict)
    split: Literal["validation", "test"] = "test"
    root: str = "runs"
    existing: Literal["resume", "restart"] = "resume"
    seed: int = 0
    batch: int = 64
    corpus_rows: int = 20_000
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    states: StatesConfig = field(default_factory=StatesConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    converter: ConverterConfig = field(default_factory=ConverterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for name in (self.name, *self.models, *self.paths):
            if not NAME.fullmatch(name):
                raise ValueError(f"names must be letters, digits, _ . - only, got {name!r}")
        for name in ("batch", "corpus_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.models:
            raise ValueError("models must name at least one model")
        if taken := self.models.keys() & {UNIGRAM, REAL}:
            raise ValueError(f"no model may be named {min(taken)}: that is a row of its own")


def plan(config: EvaluateConfig) -> dict[str, Any]:
    """What would be asked, for `--dry-run`."""
    manifest = held_out.require(config.data, config.split, _rows(config))
    budgets = [entry.calls(manifest.length) for entry in config.paths.values()]
    return {
        "run": (Folder.at(config.root) / config.name).url,
        "models": ", ".join(f"{name}: {address}" for name, address in config.models.items()),
        "split": f"{config.split}, {manifest.rows(config.split)} rows of {manifest.length} tokens",
        "likelihood_rows": config.likelihood.rows,
        "texts_per_model": sum(map(len, budgets)) * config.samples.rows,
        "calls_per_text_on_all_paths": sum(map(sum, budgets)),
    }


def execute(config: EvaluateConfig) -> dict[str, Any]:
    folder = runs.open_run(config, "evaluate")
    uri = tracking.locate(config.tracking, config.root)
    origins = {
        name: subjects.origin(name, address, uri=uri, root=config.root)
        for name, address in config.models.items()
    }
    if folder.exists(RESULT):
        return _finished(folder, origins)
    evaluation = _prepare(config, origins, uri)
    handle = runs.start(config, "evaluate", evaluation.held_out.manifest, _lineage(origins))
    say(f"run {folder.url}; metrics: {tracking.page(handle)}")
    try:
        report = _report(config, evaluation, folder)
        metrics = figures(report.tables)
        log = tracking.Logger(tracking.Journal(folder), handle)
        log.log(0, metrics)
        log.close()
        with _on_disk(folder, "report", "samples") as places:
            for place in places:
                tracking.log_artifacts(handle, place)
            handle = tracking.finish(handle)
    except BaseException as error:
        tracking.finish(handle, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    _show(report)
    plots = [folder.url_of(f"report/{plot.name}.png") for plot in report.plots]
    say(f"\nreport: {folder.url_of('report/report.html')}\nplots: {' '.join(plots)}")
    say(f"MLflow: {tracking.page(handle)}")
    result = {
        "run": folder.url,
        "run_id": handle.run_id,
        "models": origins,
        "report": folder.url_of("report/report.html"),
        "tables": folder.url_of("report/evaluation.json"),
        "metrics": metrics,
    }
    folder.write_bytes(RESULT, json.dumps(result).encode())
    return result


def _rows(config: EvaluateConfig) -> dict[str, int]:
    return {"likelihood.rows": config.likelihood.rows, "samples.rows": config.samples.rows}


def _finished(folder: Folder, origins: Mapping[str, Origin]) -> dict[str, Any]:
    """What an earlier evaluation of the very same models found."""
    result: dict[str, Any] = json.loads(folder.read_bytes(RESULT))
    if result["models"] != origins:
        raise ConfigError(
            "name",
            f"{folder.url} is an evaluation of other versions of these models",
            "Choose another name, or existing=restart to wipe it",
        )
    say(f"{folder.url} is finished; existing=restart would make it anew")
    return result


def _prepare(config: EvaluateConfig, origins: Mapping[str, Origin], uri: str) -> Evaluation:
    """The rows and the models, once all of them are known to fit together."""
    wanted = _rows(config)
    held_out.require(config.data, config.split, wanted)
    rows = held_out.read(
        config.data,
        config.split,
        max(wanted.values()),
        corpus_rows=config.corpus_rows,
        seed=config.seed,
    )
    loaded = [
        subjects.load(name, origin, rows, converter=config.converter, uri=uri)
        for name, origin in origins.items()
    ]
    return Evaluation(held_out=rows, subjects=loaded, seed=config.seed, batch=config.batch)


def _report(config: EvaluateConfig, evaluation: Evaluation, folder: Folder) -> Report:
    """Everything that is measured, written into `report` and `samples` of the run directory."""
    manifest = evaluation.held_out.manifest
    likelihood = evaluation.likelihood(config.likelihood)
    states = evaluation.states(config.states, config.likelihood.rows)
    samples, texts = evaluation.samples(config.samples, config.paths, folder / "samples")
    tables = {"likelihood": likelihood, "states": states, "samples": samples}
    report = Report(
        title=f"Evaluation {config.name}",
        subtitle=f"{config.split} split of {manifest.source} (digest {manifest.digest[:12]}), "
        f"V = {manifest.vocabulary.size}, L = {manifest.length}, seed {config.seed}",
        facts={
            "data": {"digest": manifest.digest, "split": config.split, "blocks": manifest.blocks},
            "models": {subject.name: subject.facts() for subject in evaluation.subjects},
        },
        tables=tables,
        plots=draw_plots(evaluation.subjects, tables),
        texts=texts,
    )
    for name, content in report.files().items():
        (folder / "report").write_bytes(name, content)
    return report


def _lineage(origins: Mapping[str, Origin]) -> dict[str, str]:
    """Which models were asked, as tags of the run."""
    return {
        f"model.{name}.{key}": str(value)
        for name, origin in origins.items()
        for key, value in origin.items()
        if value
    }


@contextmanager
def _on_disk(folder: Folder, *names: str) -> Iterator[list[Path]]:
    """Folders of the run directory: themselves, or copies where they are in a bucket."""
    if folder.is_local:
        yield [Path(folder.path) / name for name in names]
        return
    with tempfile.TemporaryDirectory() as staging:
        for name in names:
            (Path(staging) / name).mkdir()
            for file in (folder / name).names():
                content = (folder / name).read_bytes(file)
                (Path(staging) / name / file).write_bytes(content)
        yield [Path(staging) / name for name in names]


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
