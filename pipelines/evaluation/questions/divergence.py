"""How far the n-grams of texts are from those of held-out text: a Jensen-Shannon divergence without
a network.

The divergence of the observed frequencies is biased by how diverse the texts are: two samples of
one law differ, and those of a sharper law differ less. So it is estimated from below, in the form

    JS(P, Q) = 1 + E_P[log2 d]/2 + E_Q[log2 (1 - d)]/2,   largest for d = P / (P + Q),

(Goodfellow et al. 2014, Generative Adversarial Nets, eq. 6), with a d that has not seen the rows it
is evaluated on. Rows are dealt into folds. Counts in three fifths of the rows say ``P/Q``, with as
much added to every count as does best on another fifth (or no ratio at all); the last fifth is
evaluated; and so on in turn. Where nothing can be told apart d is 1/2 and the divergence
0, which is where real text against real text stays.

Shapes: N texts, M references, L positions, G n-grams, S ways to smooth, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from infra.errors import ConfigError
from pipelines.evaluation.cells import REAL, REFERENCES, labels, require_distinct
from pipelines.evaluation.gate import OfTexts, Resamples, means
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.metrics import numbered
from pipelines.evaluation.question import (
    Drawn,
    Part,
    Question,
    Questions,
    tokens_of,
)
from pipelines.evaluation.questions.texts import LABELS
from pipelines.evaluation.survey import Survey
from pipelines.evaluation.workspace import Workspace
from pipelines.report import Column, Row, Table
from pipelines.report.plots import quality

FOLDS = 5
LEAST = 4 * FOLDS  # texts
PRIORS = tuple(4.0**power for power in range(10))  # added to counts: 1 to 262,144
CONFIDENCE, RESAMPLES = 0.95, 500  # of the intervals


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """The `orders` n of the n-grams. It takes the first `samples.rows` texts of every source and as
    many references."""

    orders: tuple[int, ...] = (1, 2, 3, 4)

    def __post_init__(self) -> None:
        if not self.orders or min(self.orders) < 1:
            raise ValueError(f"orders holds lengths of at least 1, got {list(self.orders)}")
        require_distinct("orders", self.orders)


def scores(p_NL: np.ndarray, q_ML: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """What each text says for the divergence, in bits: ``1 + log2 d`` of the texts, ``[N]``, and
    ``1 + log2 (1 - d)`` of the references, ``[M]``, means over a row's n-grams.

    The divergence is half the sum of the two means; see `divergence`. Row i of both is dealt into
    one fold, so a row that stands in the same place of both never meets itself.
    """
    numbers = numbered(np.concatenate([p_NL, q_ML]), order)
    (p_NG, q_MG), size = np.split(numbers, [len(p_NL)]), 1 + int(numbers.max())
    p_fold_N, q_fold_M = (np.arange(len(rows)) % FOLDS for rows in (p_NG, q_MG))
    p_counts_FG, q_counts_FG = (
        np.stack([np.bincount(rows[fold == f].ravel(), minlength=size) for f in range(FOLDS)])
        for rows, fold in ((p_NG, p_fold_N), (q_MG, q_fold_M))
    )
    p_N, q_M = np.empty(len(p_NG)), np.empty(len(q_MG))
    for judged in range(FOLDS):
        tuned = (judged + 1) % FOLDS
        taught = [f for f in range(FOLDS) if f not in (judged, tuned)]
        p_G, q_G = (counts[taught].sum(0) for counts in (p_counts_FG, q_counts_FG))
        q_G = q_G * (p_G.sum() / q_G.sum())
        nothing_G = np.zeros(size)
        log_ratios_SG = [nothing_G, *(np.log((p_G + prior) / (q_G + prior)) for prior in PRIORS)]
        p_share_G, q_share_G = (
            counts[tuned] / counts[tuned].sum() for counts in (p_counts_FG, q_counts_FG)
        )
        gains_S = [p_share_G @ _bits(r_G) + q_share_G @ _bits(-r_G) for r_G in log_ratios_SG]
        log_ratio_G = log_ratios_SG[int(np.argmax(gains_S))]
        p_at_N, q_at_M = p_fold_N == judged, q_fold_M == judged
        p_N[p_at_N] = _bits(log_ratio_G)[p_NG[p_at_N]].mean(1)
        q_M[q_at_M] = _bits(-log_ratio_G)[q_MG[q_at_M]].mean(1)
    return p_N, q_M


def divergence(p_N: np.ndarray, q_M: np.ndarray, draws: Resamples) -> np.ndarray:
    """The Jensen-Shannon divergence in bits of each resample of texts and references, ``[1 + R]``,
    that of the rows as they are first."""
    ours_R, theirs_R = means(p_N, draws.rows(len(p_N))), means(q_M, draws.references(len(q_M)))
    return (ours_R + theirs_R) / 2


def _bits(log_ratio_G: np.ndarray) -> np.ndarray:
    """``1 + log2 d`` where ``d = P / (P + Q)`` and ``log_ratio = log(P / Q)``."""
    return 1 - np.logaddexp(0, -log_ratio_G) / np.log(2)


# --- parts -------------------------------------------------------------------------------------


def _scored(workspace: Workspace, *, source: str) -> pa.Table:
    """The scores by order, ``texts_n`` and ``references_n``; no row for the references themselves,
    under whatever name."""
    rows = workspace.config.samples.rows
    p_NL, q_ML = (tokens_of(workspace, name, 0, rows) for name in (source, REFERENCES))
    columns: dict[str, Any] = {}
    for order in workspace.config.divergence.orders:
        p_N, q_M = scores(p_NL, q_ML, order)
        columns |= {f"texts_{order}": p_N, f"references_{order}": q_M}
    return pa.table(columns).slice(0, 0 if np.array_equal(p_NL, q_ML) else len(p_NL))


def _group(source: str) -> str:
    return f"parts/divergence/{source}"


# --- what the gate may compare -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NGramDivergence(OfTexts):
    """Jensen-Shannon divergence of the texts' n-grams from those of held-out text; lower is better.
    `order` is one of those that are measured."""

    order: int = 2
    kind: Literal["divergence"] = "divergence"

    sign: ClassVar[int] = -1
    section: ClassVar[str] = "divergence"

    @property
    def label(self) -> str:
        return f"{super().label}, n = {self.order}"

    def figures(self, survey: Survey, model: str, draws: Resamples) -> np.ndarray:
        found = survey.columns(_group(self.source(survey, model)))
        return divergence(found[f"texts_{self.order}"], found[f"references_{self.order}"], draws)

    def require(self, survey: Survey, candidate: str) -> None:
        super().require(survey, candidate)
        if self.order not in survey.config.divergence.orders:
            why = f"asks for the divergence of {self.order}-grams, which is not measured"
            raise ConfigError("gate", why, "Give it among divergence.orders, too")


# --- the question ------------------------------------------------------------------------------


class Divergence(Question):
    section, settings, optional = "divergence", DivergenceConfig, True
    title = "N-grams against held-out text"
    gate_metrics = (NGramDivergence,)

    def check(self, config: Questions) -> None:
        if config.samples.rows < LEAST:
            raise ValueError(
                f"the divergence of n-grams needs at least {LEAST} texts, and samples.rows is "
                f"{config.samples.rows}; raise it or leave divergence out"
            )

    def require(self, config: Questions, held_out: HeldOut, uri: str) -> None:
        longest, length = max(config.divergence.orders), held_out.manifest.length
        if longest > length:
            why = f"{longest}-grams, and rows hold {length} tokens"
            raise ConfigError("divergence.orders", why, f"Ask for at most {length}")

    def of_corpus(self, survey: Survey, source: str, texts: int) -> Iterable[Part]:
        if source != REFERENCES:
            yield Part(group=_group(source), first=0, work=partial(_scored, source=source))

    def tables(self, survey: Survey) -> Mapping[str, Table]:
        orders, rows = survey.config.divergence.orders, list(_rows(survey))
        split = (Column("split", "Split"),) if any("split" in row for row in rows) else ()
        by_order = (
            (Column(f"js_{n}", f"n = {n}", ".4f"), Column(f"js_{n}_interval", "Interval"))
            for n in orders
        )
        made = Table(
            title="N-grams against held-out text",
            note="Jensen-Shannon divergence of token n-grams in bits, from 0 to 1, estimated from "
            "below with rows held apart, so that chance adds nothing to it and a lack of diversity "
            f"takes nothing away; {CONFIDENCE:.0%} intervals over texts and references. {REAL} is "
            f"the floor: other real text of the same size, {survey.config.samples.rows:,} texts.",
            columns=(*LABELS, *split, Column("budget", "Budget"), *chain.from_iterable(by_order)),
            rows=rows,
        )
        return {"divergence": made}

    def plots(self, survey: Survey, tables: Mapping[str, Table]) -> Iterator[Drawn]:
        """Against calls, beside what stands beside the models."""
        rows = [{**row, "calls": row.get("budget")} for row in tables["divergence"].rows]
        for n in survey.config.divergence.orders:
            key, title = f"js_{n}", f"Divergence of {n}-grams from held-out text"
            anchors = {row["model"]: row[key] for row in rows if "path" not in row and key in row}
            walked = [row for row in rows if "path" in row]
            yield f"{key}_by_calls", title, quality(walked, key, label="bits", anchors=anchors)


def _rows(survey: Survey) -> Iterator[Row]:
    """What stands beside the models, and every cell."""
    beside = [({"model": name}, name) for name in survey.config.beside]
    for named, source in (*beside, *((labels(cell), cell.name) for cell in survey.walked)):
        found = survey.columns(_group(source))
        row: dict[str, Any] = dict(named)
        for order in survey.config.divergence.orders:
            p_N, q_M = found[f"texts_{order}"], found[f"references_{order}"]
            if len(p_N):
                row |= estimated(f"js_{order}", p_N, q_M, survey.config.seed)
        yield row


def estimated(key: str, p_N: np.ndarray, q_M: np.ndarray, seed: int) -> Row:
    """A divergence and its interval, as a table holds them, from the scores of texts and
    references."""
    js_R = divergence(p_N, q_M, Resamples(seed, RESAMPLES))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(js_R[1:], (tail, 1 - tail)).tolist()
    interval = {f"{key}_low": low, f"{key}_high": high}
    return {key: float(js_R[0]), **interval, f"{key}_interval": f"{low:.4f} to {high:.4f}"}
