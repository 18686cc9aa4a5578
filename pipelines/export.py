"""Make a folder of a model that anybody loads with the `transformers` library, without this code.

    python pipelines/export.py model=models:/dsl@champion out=exported
    python pipelines/export.py model=runs/owt-dsl out=exported push=user/name licence=apache-2.0 \\
        path='{kind: hybrid, first: {kind: sentence_sde, gamma_max: 20}, second: masked,
        split: [16, 16]}'

    model = AutoModelForMaskedLM.from_pretrained("exported", trust_remote_code=True)
    ids = model.generate(rows=4, length=128, seed=0)

Nothing is pushed without `push` and a token in the environment (`HF_TOKEN`).
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsl.errors import PathError
from dsl.paths import AnyPath, Hybrid, choose
from infra import tracking
from infra.config import at_least, to_tree
from infra.errors import ConfigError
from infra.storage import Folder
from pipelines import models, prompts, verb
from pipelines.exporting import card, package, push
from pipelines.models import ConverterConfig, Model
from pipelines.verb import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which model, and where its folder goes.

    `model` is any address that `finetune.init` takes; an MDLM checkpoint needs a `tokenizer` too.
    `path` and `budget` are what `generate` takes by default. `evaluation` is the run of an
    `evaluate` whose tables the card shows; by default the one that the registry names. `licence` is
    that of the base's weights, as SPDX writes it. `push` is a repository of the hub, `user/name`.
    `trust_remote_code` runs code that came with the weights, and puts it into the folder as well.
    """

    model: str
    out: str
    push: str | None = None
    path: AnyPath | None = None
    budget: int | None = None
    evaluation: str | None = None
    licence: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    converter: ConverterConfig = field(default_factory=ConverterConfig)
    root: str = "runs"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        at_least(1, self, "budget")


def load(config: ExportConfig) -> Model:
    """The model, once all that could be wrong with the rest has been looked at."""
    out = Folder.at(config.out)
    if out.names() and not out.exists(package.CODE.name):
        raise ConfigError("out", f"{out.url} holds other files", "Choose an empty folder")
    if config.push:
        push.require(config.push)
    if config.evaluation and not report(config.evaluation).exists(card.REPORT):
        why = f"there is no {card.REPORT} in {report(config.evaluation).url}"
        raise ConfigError("evaluation", why, "Name the run of a finished evaluation")
    uri = tracking.locate(config.tracking, config.root)
    model = models.load(
        config.model,
        converter=config.converter,
        tracking_uri=uri,
        trust_remote_code=config.trust_remote_code,
    )
    return prompts.with_vocabulary(model, config.tokenizer)


def report(evaluation: str) -> Folder:
    """Where the run of an evaluation keeps its report."""
    return Folder.at(evaluation) / "report"


def generation(config: ExportConfig, model: Model) -> dict[str, Any]:
    """The path and budget that the exported model takes by default.

    Without a budget it is one call a token, as for a model that does not say how long its rows are,
    or that reads from left to right.
    """
    causal = model.denoiser.config.backbone.causal
    try:
        path, budget = choose(config.path, config.budget, length=model.length or 1, causal=causal)
    except PathError as error:
        raise ConfigError("path", str(error)) from error
    known = config.budget or (model.length and not causal) or isinstance(path, Hybrid)
    return {"path": to_tree(path), **({"budget": budget} if known else {})}


def execute(config: ExportConfig) -> dict[str, Any]:
    source = card.provenance(config.model, tracking.locate(config.tracking, config.root))
    # The version that was found, should the alias move meanwhile.
    model = load(replace(config, model=source.version or config.model))
    chosen, out = generation(config, model), Folder.at(config.out)
    name = config.push or Path(out.path).resolve().name  # also of `.`
    text = card.card(
        model,
        title=name.rpartition("/")[2],
        name=name,
        mask=package.mask_of(model)[0],
        generation=chosen,
        source=source,
        report=report(config.evaluation).url if config.evaluation else source.report,
        licence=config.licence,
    )
    with tempfile.TemporaryDirectory() as staging:
        package.write(model, Path(staging), generation=chosen, card=text)
        package.copy(Path(staging), out)
        pushed = push.push(Path(staging), config.push) if config.push else None
    return {
        "folder": out.url,
        "model": config.model,
        "version": source.version,
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),
        "path": chosen["path"],
        "budget": chosen.get("budget"),
        "pushed": pushed,
    }


def plan(config: ExportConfig) -> dict[str, Any]:
    model = load(config)
    parameters = sum(p.numel() for p in model.denoiser.parameters())
    chosen = generation(config, model)
    return {
        "model": config.model,
        "objective": model.kind,
        "parameters": parameters,
        "bytes": 4 * parameters,
        "path": chosen["path"]["kind"],
        "out": Folder.at(config.out).url,
        "push": config.push or "no",
    }


def main() -> int:
    return verb.run("export", ExportConfig, plan=plan, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
