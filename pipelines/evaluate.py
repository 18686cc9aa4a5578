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

import torch

from infra import cluster, command, tracking
from infra.config import digest, to_tree, to_yaml
from infra.errors import ConfigError, DataError, nearest
from infra.storage import Folder
from infra.tracking import RunHandle, TrackingConfig
from pipelines import evaluation, models
from pipelines.evaluation import HeldOut, Subject
from pipelines.launch import DATA_ERRORS, RESULT, open_run, say
from pipelines.measures import LikelihoodConfig, PathConfig, SamplesConfig, StatesConfig
from pipelines.models import ConverterConfig
from pipelines.report import Report, markdown

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
SHOWN = 300  # characters of a sample in the terminal


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
        if taken := self.models.keys() & set(evaluation.ANCHORS):
            raise ValueError(f"models may not be named {min(taken)}, which is a row of its own")


def plan(config: EvaluateConfig) -> dict[str, Any]:
    """What would be asked, for `--dry-run`."""
    manifest = evaluation.manifest_of(config)
    walks = sum(len(path.budgets) for path in config.paths.values())
    return {
        "run": (Folder.at(config.root) / config.name).url,
        "models": ", ".join(f"{name}: {address}" for name, address in config.models.items()),
        "split": f"{config.split}, {manifest.rows(config.split)} rows of {manifest.length} tokens",
        "likelihood_rows": config.likelihood.rows,
        "texts_per_model": walks * config.samples.rows,
        "calls_per_text": sum(sum(path.budgets) for path in config.paths.values()),
    }


def execute(config: EvaluateConfig) -> dict[str, Any]:
    folder = open_run(config, "evaluate")
    uri = tracking.locate(config.tracking, config.root)
    origins = {
        name: evaluation.origin(_spelt(name, address), uri, config.root)
        for name, address in config.models.items()
    }
    if folder.exists(RESULT):
        return _finished(folder, origins)
    held_out = HeldOut.read(config)
    subjects = [_subject(config, name, held_out, origins[name], uri) for name in config.models]
    handle = _start(config, held_out, origins)
    say(f"run {folder.url}; metrics: {tracking.page(handle)}")
    try:
        made, metrics = evaluation.evaluate(config, held_out, subjects, folder / "samples")
        for name, content in made.files().items():
            (folder / "report").write_bytes(name, content)
        log = tracking.Logger(tracking.Journal(folder), handle)
        log.log(0, metrics)
        log.close()
        with _on_disk(folder) as places:
            for place in places:
                tracking.log_artifacts(handle, place)
            handle = tracking.finish(handle)
    except BaseException as error:
        tracking.finish(handle, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    _show(made)
    say(f"report: {folder.url_of('report/report.html')}\nmetrics: {tracking.page(handle)}")
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


def _spelt(name: str, address: str) -> str:
    """The address, if something is there; DataError with the nearest neighbour if not."""
    if address.startswith("models:/") or Folder.at(address).exists():
        return address
    parent, last = Folder.holding(address.rstrip("/"))
    near = nearest(last, parent.names())
    fix = f"Did you mean {parent.url_of(near)}?" if near else "Give a run, a model or models:/…"
    raise DataError(f"models.{name}", f"{address}: no such model", fix)


def _finished(folder: Folder, origins: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier evaluation of the very same models found."""
    result: dict[str, Any] = json.loads(folder.read_bytes(RESULT))
    if result["models"] != origins:
        raise ConfigError(
            "name",
            f"{folder.url} is an evaluation of earlier versions of these models",
            "Choose another name, or existing=restart to wipe it",
        )
    say(f"{folder.url} is finished; existing=restart would make it anew")
    return result


def _subject(
    config: EvaluateConfig, name: str, held_out: HeldOut, origin: Mapping[str, Any], uri: str
) -> Subject:
    where, address = f"models.{name}", config.models[name]
    # The version that was found, should the alias move meanwhile.
    found = origin.get("version", address)
    model = models.load(found, converter=config.converter, tracking_uri=uri)
    models.require_same(model, held_out.vocabulary, where)
    length = held_out.rows_NL.shape[1]
    if model.length not in (None, length):
        why = f"{address} was trained on rows of {model.length} tokens, the data has {length}"
        raise DataError(where, why, f"Prepare the data with length={model.length}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Subject(
        name=name, kind=model.kind, denoiser=model.denoiser.to(device).eval(), origin=origin
    )


def _start(
    config: EvaluateConfig, held_out: HeldOut, origins: Mapping[str, Mapping[str, Any]]
) -> RunHandle:
    commit = cluster.commit()
    return tracking.start(
        config.tracking,
        root=config.root,
        name=config.name,
        params=to_tree(config),
        tags={
            "verb": "evaluate",
            "commit": commit.sha if commit else "unknown",
            "dirty": str(bool(commit and commit.dirty)).lower(),
            "config_hash": digest(config),
            "ray_job_id": cluster.job_id() or "none",
            **{
                f"model.{name}.{key}": str(value)
                for name, origin in origins.items()
                for key, value in origin.items()
            },
        },
        config_yaml=to_yaml(config, "evaluate"),
        dataset={
            "name": held_out.manifest.source,
            "digest": held_out.manifest.digest,
            "source": Folder.at(config.data).url,
        },
    )


@contextmanager
def _on_disk(folder: Folder) -> Iterator[list[Path]]:
    """The folders to show as artifacts: themselves, or copies of a bucket's."""
    names = ("report", "samples")
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


def _show(made: Report) -> None:
    for text in made.texts:
        flat = " ".join(text.text.split())
        say(f"\n{text.heading}: {flat[:SHOWN]}{'…' if len(flat) > SHOWN else ''}")
    for table in made.tables.values():
        say(f"\n{table.title}\n{markdown(table)}")


def main() -> int:
    return command.run(
        "evaluate",
        EvaluateConfig,
        plan=plan,
        execute=execute,
        presets=Path(__file__).with_name("presets"),
        doc=__doc__ or "",
        data_errors=DATA_ERRORS,
    )


if __name__ == "__main__":
    sys.exit(main())
