"""How likely held-out text is to each model, by every view of the likelihood that it has.

Shapes: B rows of a task, N rows, L positions, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor

from dsl import likelihood
from dsl.denoiser import Denoiser
from dsl.likelihood import Estimate, PathName
from infra.errors import ConfigError
from pipelines.evaluation import metrics
from pipelines.evaluation.cells import UNIGRAM
from pipelines.evaluation.evaluation import Evaluation
from pipelines.evaluation.gate import Resamples, means
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.layouts import OURS, THEIRS, published_table, with_sources
from pipelines.evaluation.metrics import Score
from pipelines.evaluation.question import Columns, Drawn, OfRows, Questions, RowQuestion, entries
from pipelines.evaluation.subjects import Subject
from pipelines.evaluation.workspace import Workspace
from pipelines.kinds import AR, ModelKind
from pipelines.report import BOUND, Column, Row, Rows, Table
from pipelines.report.plots import nll

EXACT = "exact"


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """How long to look at `rows` held-out rows.

    `samples`: denoiser calls for the bound at the endpoints. `steps`: calls for each integral
    over SNR. The path integral goes to `gamma_max` along each of the `contours`: the exact
    posterior gives one number on all of them, so their spread says how far a model is from being
    one. The hybrid bound is taken at every `gamma_star`: choose the best with `split=validation`
    and report that one, not the minimum, on the test split.
    """

    rows: int = 256
    samples: int = 16
    steps: int = 32
    gamma_max: float = 100.0
    gamma_star: tuple[float, ...] = (100.0,)
    contours: tuple[PathName, ...] = ("diffusion",)

    def __post_init__(self) -> None:
        for name, least in (("rows", 2), ("samples", 2), ("steps", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for gamma in (self.gamma_max, *self.gamma_star):
            if not 0 < gamma < math.inf:
                raise ValueError(f"gamma_max and gamma_star must be positive, got {gamma}")


# --- the views ---------------------------------------------------------------------------------


class View(NamedTuple):
    """One way to a likelihood. `measure` takes a denoiser, rows and ``first_row``, and answers
    with an `Estimate`."""

    name: str
    meaning: str
    measure: partial[Estimate]
    gamma_star: float | None = None


def views(kind: ModelKind, config: LikelihoodConfig, seed: int) -> tuple[View, ...]:
    """The views that a kind of model has, each at all of its settings."""
    return tuple(view for name in kind.views for view in VIEWS[name](config, seed))


def _exact(config: LikelihoodConfig, seed: int) -> Iterator[View]:
    yield View(EXACT, "exact", partial(_ar))


def _endpoints(config: LikelihoodConfig, seed: int) -> Iterator[View]:
    measure = partial(likelihood.roar, samples=config.samples, seed=seed)
    yield View("endpoint_bound", "upper bound, tokens revealed in random order", measure)


def _integrals(config: LikelihoodConfig, seed: int) -> Iterator[View]:
    settings = {"gamma_max": config.gamma_max, "steps": config.steps, "seed": seed}
    for contour in config.contours:
        name = "path_integral" if contour == "diffusion" else f"path_integral_{contour}"
        measure = partial(likelihood.path_integral, path=contour, **settings)
        yield View(name, f"estimate, no bound: stops at SNR {config.gamma_max:g}", measure)


def _hybrids(config: LikelihoodConfig, seed: int) -> Iterator[View]:
    settings = {"steps": config.steps, "seed": seed}
    for gamma in config.gamma_star:
        measure = partial(likelihood.hybrid_bound, gamma_star=gamma, **settings)
        meaning = f"upper bound, to SNR {gamma:g}"
        yield View(f"hybrid_bound_{gamma:g}", meaning, measure, gamma)


VIEWS = {
    EXACT: _exact,
    "endpoint_bound": _endpoints,
    "path_integral": _integrals,
    "hybrid_bound": _hybrids,
}


def _ar(denoiser: Denoiser, tokens_BL: Tensor, *, first_row: int) -> Estimate:
    return likelihood.ar(denoiser, tokens_BL)


def _nats(view: partial[Estimate], denoiser: Denoiser, tokens_BL: Tensor, **row: int) -> Columns:
    return {"nats": view(denoiser, tokens_BL, **row).mean_B.numpy()}


# --- the question ------------------------------------------------------------------------------


def _group(model: str, view: str) -> str:
    return f"parts/likelihood/{model}/{view}"


@dataclass(frozen=True, kw_only=True)
class Nats:
    """Nats per token of held-out rows by one view; lower is better.

    Where a model's likelihood is exact there is one view of it, which stands for any bound.
    """

    view: str = "endpoint_bound"
    kind: Literal["likelihood"] = "likelihood"

    sign: ClassVar[int] = -1
    resamples: ClassVar[None] = None

    @property
    def label(self) -> str:
        return f"nats per token, {self.view}"

    def figures(self, evaluation: Evaluation, model: str, draws: Resamples) -> np.ndarray:
        kind = evaluation.kinds.get(model, AR)  # the unigram's is exact, too
        view = EXACT if EXACT in kind.views else self.view
        nats_N = evaluation.columns(_group(model, view))["nats"]
        return means(nats_N, draws.rows(len(nats_N)))

    def require(self, evaluation: Evaluation, candidate: str) -> None:
        """ConfigError where the candidate's likelihood has no such view."""
        config, kind = evaluation.config, evaluation.kinds[candidate]
        known = [view.name for view in views(kind, config.likelihood, config.seed)]
        if self.view not in known and EXACT not in known:
            why = f"{self.view} is no view of the likelihood of {candidate}"
            raise ConfigError("gate", why, f"Name one of: {', '.join(known)}")


class Likelihood(RowQuestion):
    section, settings, gate_metrics = "likelihood", LikelihoodConfig, (Nats,)
    name, title = "likelihood", "Likelihood of held-out text"
    text = (
        "Every token counts, end marks too, which hold no byte. ± is one standard error over rows."
    )
    table = (
        Column("model", "Model"),
        Column("view", "View"),
        Column("nats_per_token", "Nats per token", ".4f"),
        Column("bits_per_byte", "Bits per byte", ".4f"),
        Column("perplexity", "Perplexity", ".4g"),
        Column("meaning", "Which is"),
    )

    def held_out_rows(self, config: Questions) -> Mapping[str, int]:
        return {"likelihood.rows": config.likelihood.rows}

    def prepare(self, workspace: Workspace, held_out: HeldOut) -> None:
        rows_NL = held_out.rows_NL[: workspace.config.likelihood.rows]
        nats = pa.table({"nats": held_out.unigram.nats(rows_NL)})
        workspace.parts.write(_group(UNIGRAM, EXACT), 0, nats, {})

    def asked(self, config: Questions, kind: ModelKind) -> Mapping[str, OfRows]:
        found = views(kind, config.likelihood, config.seed)
        return {view.name: partial(_nats, view.measure) for view in found}

    def rows(self, evaluation: Evaluation, subject: Subject) -> Iterator[Row]:
        config = evaluation.config
        for view in views(subject.trained_as, config.likelihood, config.seed):
            yield _row(evaluation, subject.name, view)

    def tables(self, evaluation: Evaluation) -> Mapping[str, Table]:
        """Every view of every model's likelihood, below that of the unigram, which is the floor."""
        (made,) = super().tables(evaluation).values()
        config, bytes_N = evaluation.config, _bytes(evaluation)
        (floor,) = _exact(config.likelihood, config.seed)
        rows, length = len(bytes_N), evaluation.held_out.manifest.length
        size = f"{rows:,} rows, {rows * length:,} tokens, {bytes_N.sum():,} bytes."
        rows = [_row(evaluation, UNIGRAM, floor), *made.rows]
        return {self.name: replace(made, note=f"{size} {made.note}", rows=rows)}

    def layouts(self, evaluation: Evaluation, tables: Mapping[str, Table]) -> Mapping[str, Table]:
        made = bits(tables[self.name].rows, evaluation.config.published)
        return {"bits": made} if made else {}

    def plots(self, evaluation: Evaluation, tables: Mapping[str, Table]) -> Iterable[Drawn]:
        """The hybrid bound at every gamma*, and the bound at the endpoints to compare it with."""
        rows = tables[self.name].rows
        shown = [row for row in rows if "gamma_star" in row or row["view"] == "endpoint_bound"]
        return [("nll", "Likelihood against the SNR of the bound", nll(shown))]


def _bytes(evaluation: Evaluation) -> np.ndarray:
    """How many bytes each row stands for, ``[N]``."""
    return evaluation.held_out.bytes_N[: evaluation.config.likelihood.rows]


def _row(evaluation: Evaluation, model: str, view: View) -> Row:
    nats_N, bytes_N = evaluation.columns(_group(model, view.name))["nats"], _bytes(evaluation)
    nats, bits_N = metrics.mean(nats_N), nats_N * evaluation.held_out.manifest.length / math.log(2)
    perplexity = likelihood.perplexity(nats.value)
    return {
        "model": model,
        "view": view.name,
        **entries("nats_per_token", nats),
        **entries("bits_per_byte", metrics.ratio(bits_N, bytes_N)),
        **entries("perplexity", Score(perplexity, perplexity * nats.stderr)),
        "meaning": view.meaning,
        **({} if view.gamma_star is None else {"gamma_star": view.gamma_star}),
    }


def bits(rows: Rows, published: Iterable[str]) -> Table | None:
    """Bits per character and perplexity (003 table 1) of what is a bound or exact; the papers'
    rows below, where asked for."""
    theirs = published_table("text8_bpc") if "text8_bpc" in published else None
    lines: list[Row] = []
    for row in rows:
        bound = row["view"].startswith(("endpoint_bound", "hybrid_bound"))
        if bound or row["view"] == EXACT:
            signs = {key + BOUND: bound for key in ("bits_per_byte", "perplexity")}
            lines.append({**row, **signs, "source": OURS})
    for row in theirs.rows if theirs else ():
        name = f"{row['model']}, {row['family']}"
        lines.append({**row, "model": name, "source": THEIRS})
    return with_sources(
        "Bits per character and perplexity",
        "≤: an upper bound. Bits per byte are bits per character where the text is ASCII; "
        "perplexity is that of a token.",
        (
            *(Column("model", "Model"), Column("view", "View")),
            Column("bits_per_byte", "BPC ↓", ".3f"),
            Column("perplexity", "PPL ↓", ".2f"),
        ),
        lines,
        theirs,
    )
