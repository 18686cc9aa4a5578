"""How likely held-out text is to each model, by every view of the likelihood that it has.

Shapes: B rows of a part, N rows, L positions, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor

from dsl import likelihood, unmasking
from dsl.denoiser import Denoiser
from dsl.likelihood import Estimate, PathName
from dsl.paths import EntropyBounded
from infra.errors import ConfigError
from pipelines.evaluation import metrics
from pipelines.evaluation.cells import UNIGRAM, require_distinct
from pipelines.evaluation.gate import Resamples, means
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.layouts import OURS, THEIRS, published_table, with_sources
from pipelines.evaluation.metrics import Score
from pipelines.evaluation.question import (
    Columns,
    Drawn,
    OfRows,
    Questions,
    RowQuestion,
    entries,
)
from pipelines.evaluation.subjects import Subject
from pipelines.evaluation.survey import Survey
from pipelines.evaluation.workspace import Workspace
from pipelines.kinds import AR, KINDS, ModelKind
from pipelines.report import BOUND, Column, Row, Rows, Table
from pipelines.report.plots import nll

EXACT, UNMASKING = "exact", "unmasking"


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """How long to look at `rows` held-out rows.

    `samples`: denoiser calls for the bound at the endpoints. `steps`: calls for each integral
    over SNR. The path integral goes to `gamma_max` along each of the `contours`: the exact
    posterior gives one number on all of them, so their spread says how far a model is from being
    one. The hybrid bound is taken at every `gamma_star`: choose the best with `split=validation`
    and report that one, not the minimum, on the test split. The first `unmasking_rows` rows also
    get their exact likelihood under unmasking, at one denoiser call a token; none leaves it out.
    """

    rows: int = 256
    samples: int = 16
    steps: int = 32
    gamma_max: float = 100.0
    gamma_star: tuple[float, ...] = (100.0,)
    contours: tuple[PathName, ...] = ("diffusion",)
    unmasking_rows: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rows", 2), ("samples", 2), ("steps", 2), ("unmasking_rows", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.unmasking_rows > self.rows:
            raise ValueError(f"unmasking_rows is {self.unmasking_rows}, and rows {self.rows}")
        for gamma in (self.gamma_max, *self.gamma_star):
            if not 0 < gamma < math.inf:
                raise ValueError(f"gamma_max and gamma_star must be positive, got {gamma}")
        require_distinct("gamma_star", self.gamma_star)
        require_distinct("contours", self.contours)


# --- the views ---------------------------------------------------------------------------------


class View(NamedTuple):
    """One way to a likelihood. `measure` takes a denoiser, rows and ``first_row``, and answers
    with an `Estimate`."""

    name: str
    meaning: str
    measure: Callable[..., Estimate]
    gamma_star: float | None = None


def views(kind: ModelKind, config: LikelihoodConfig, seed: int) -> list[View]:
    """The views that a kind of model has, each at all of its settings."""
    roar = partial(likelihood.roar, samples=config.samples, seed=seed)
    calls = {"steps": config.steps, "seed": seed}
    integral = partial(likelihood.path_integral, gamma_max=config.gamma_max, **calls)
    no_bound = f"estimate, no bound: stops at SNR {config.gamma_max:g}"
    bound = partial(likelihood.hybrid_bound, **calls)
    name, to = "hybrid_bound_{:g}", "upper bound, to SNR {:g}"
    by_order = f"exact for texts drawn a token a call, surest first: {config.unmasking_rows:,} rows"
    known = {
        "exact": [View(EXACT, "exact", _ar)],
        "endpoint_bound": [
            View("endpoint_bound", "upper bound, tokens revealed in random order", roar)
        ],
        "path_integral": [
            View(_integral_name(contour), no_bound, partial(integral, path=contour))
            for contour in config.contours
        ],
        "hybrid_bound": [
            View(name.format(at), to.format(at), partial(bound, gamma_star=at), at)
            for at in config.gamma_star
        ],
        "unmasking": [View(UNMASKING, by_order, partial(_unmasking, seed=seed))]
        if config.unmasking_rows
        else [],
    }
    return [view for name in kind.views for view in known[name]]


def _integral_name(contour: PathName) -> str:
    return "path_integral" if contour == "diffusion" else f"path_integral_{contour}"


def _ar(denoiser: Denoiser, tokens_BL: Tensor, *, first_row: int) -> Estimate:
    return likelihood.ar(denoiser, tokens_BL)


def _unmasking(denoiser: Denoiser, tokens_BL: Tensor, *, seed: int, first_row: int) -> Estimate:
    """Under the order that the posterior decides: the position of least entropy comes next."""
    how = {"budget": tokens_BL.shape[1], "seed": seed, "first_row": first_row}
    return unmasking.estimate(denoiser, tokens_BL, EntropyBounded(bound=0.0), **how)


def _nats(
    view: Callable[..., Estimate], denoiser: Denoiser, tokens_BL: Tensor, **row: int
) -> Columns:
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

    def figures(self, survey: Survey, model: str, draws: Resamples) -> np.ndarray:
        kind = survey.kinds.get(model, AR)  # the unigram's is exact, too
        view = EXACT if EXACT in kind.views else self.view
        # An exact likelihood of more rows than the view was taken of is compared on the same rows.
        rows = _rows(survey.config, self.view)
        nats_N = survey.columns(_group(model, view))["nats"][:rows]
        return means(nats_N, draws.rows(len(nats_N)))

    def require(self, survey: Survey, candidate: str) -> None:
        """ConfigError where the candidate's likelihood has no such view, or, if it is exact, where
        none has."""
        config, kind = survey.config, survey.kinds[candidate]
        kinds = KINDS.values() if EXACT in kind.views else [kind]
        every = (view for kind in kinds for view in views(kind, config.likelihood, config.seed))
        known = list(dict.fromkeys(view.name for view in every))
        if self.view not in known:
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
        if not workspace.parts.present(_group(UNIGRAM, EXACT)):
            rows_NL = held_out.rows_NL[: workspace.config.likelihood.rows]
            nats = pa.table({"nats": held_out.unigram.nats(rows_NL)})
            workspace.parts.write(_group(UNIGRAM, EXACT), 0, nats, {})

    def asked(self, config: Questions, kind: ModelKind) -> Mapping[str, OfRows]:
        found = views(kind, config.likelihood, config.seed)
        return {view.name: partial(_nats, view.measure) for view in found}

    def asked_rows(self, config: Questions, asked: str) -> int:
        return _rows(config, asked)

    def rows(self, survey: Survey, subject: Subject) -> Iterator[Row]:
        config = survey.config
        for view in views(subject.trained_as, config.likelihood, config.seed):
            yield _row(survey, subject.name, view)

    def tables(self, survey: Survey) -> Mapping[str, Table]:
        """Every view of every model's likelihood, below that of the unigram, which is the floor."""
        (made,) = super().tables(survey).values()
        config, bytes_N = survey.config, _bytes(survey)
        (floor,) = views(AR, config.likelihood, config.seed)
        rows, length = len(bytes_N), survey.held_out.manifest.length
        size = f"{rows:,} rows, {rows * length:,} tokens, {bytes_N.sum():,} bytes."
        rows = [_row(survey, UNIGRAM, floor), *made.rows]
        return {self.name: replace(made, note=f"{size} {made.note}", rows=rows)}

    def layouts(self, survey: Survey, tables: Mapping[str, Table]) -> Mapping[str, Table]:
        if "text8_bpc" not in survey.config.published:
            return {}
        return {"bits": bits(tables[self.name].rows)}

    def plots(self, survey: Survey, tables: Mapping[str, Table]) -> Iterable[Drawn]:
        """The hybrid bound at every gamma*, and the bound at the endpoints to compare it with."""
        rows = tables[self.name].rows
        shown = [row for row in rows if "gamma_star" in row or row["view"] == "endpoint_bound"]
        return [("nll", "Likelihood against the SNR of the bound", nll(shown))]


def _rows(config: Questions, view: str) -> int:
    """How many rows a view of the likelihood is taken of."""
    settings: LikelihoodConfig = config.likelihood
    return settings.unmasking_rows if view == UNMASKING else settings.rows


def _bytes(survey: Survey) -> np.ndarray:
    """How many bytes each row stands for, ``[N]``."""
    return survey.held_out.bytes_N[: survey.config.likelihood.rows]


def _row(survey: Survey, model: str, view: View) -> Row:
    nats_N = survey.columns(_group(model, view.name))["nats"]
    bytes_N = _bytes(survey)[: len(nats_N)]
    nats, bits_N = metrics.mean(nats_N), nats_N * survey.held_out.manifest.length / math.log(2)
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


def bits(rows: Rows) -> Table:
    """Bits per character and perplexity (003 table 1) of what is a bound or exact, with the
    papers' rows below."""
    theirs = published_table("text8_bpc")
    lines: list[Row] = []
    for row in rows:
        bound = row["view"].startswith(("endpoint_bound", "hybrid_bound"))
        if bound or row["view"] == EXACT:
            signs = {key + BOUND: bound for key in ("bits_per_byte", "perplexity")}
            lines.append({**row, **signs, "source": OURS})
    for row in theirs.rows:
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
