"""Where the nats are lost, on text of a known law: in the network, or on the path.

Rows that `pipelines.examples.law` has drawn have an exact posterior. In every state that a model
was trained on, its Kullback-Leibler divergence from the exact posterior is what the network lacks.
And the exact posterior draws texts along the model's own paths, in its own table: how far their
n-grams are from the law is what the path costs, and the rest of the model's divergence is due to
its network.

Shapes: B rows of a part, L positions, V tokens, A asked positions (flat), N texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import dsl
from dsl.chain import ChainDenoiser
from dsl.denoiser import Denoiser
from infra.config import at_least
from infra.storage import Folder
from pipelines.evaluation.cells import REAL, REFERENCES, Cell, labels
from pipelines.evaluation.conditions import Condition, shown
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.metrics import mean
from pipelines.evaluation.parts import chunks, lists, matrix
from pipelines.evaluation.question import (
    Columns,
    Drawn,
    OfRows,
    Part,
    Questions,
    RowQuestion,
    entries,
    require_paths,
)
from pipelines.evaluation.questions.divergence import CONFIDENCE, LEAST, estimated, scores
from pipelines.evaluation.questions.states import conditions, mean_hidden
from pipelines.evaluation.questions.texts import LABELS
from pipelines.evaluation.subjects import Subject
from pipelines.evaluation.survey import Survey
from pipelines.evaluation.workspace import Workspace
from pipelines.examples import law
from pipelines.kinds import ModelKind
from pipelines.report import Column, Row, Rows, Table
from pipelines.report.plots import by_state


@dataclass(frozen=True, kw_only=True)
class LawConfig:
    """The exact posterior is asked about this many of the likelihood's `rows`, and draws as many
    texts along those of the `paths` that are named here. A call of a chain of order 2 over 28
    tokens takes one or two milliseconds of a CPU for a row of 64."""

    rows: int = 256
    paths: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(1, self, "rows")


@cache
def _exact(url: str) -> Any:
    return law.read(Folder.at(url))


@torch.no_grad()
def gaps(
    denoiser: Denoiser,
    tokens_BL: Tensor,
    *,
    exact: ChainDenoiser,
    condition: Condition,
    seed: int,
    first_row: int = 0,
) -> Columns:
    """Means over the unrevealed tokens of each row ``[B]``, in nats: the exact posterior's entropy
    (``entropy``) and the Kullback-Leibler divergence of the network's from it (``gap``)."""
    tokens_BL, state = shown(denoiser, tokens_BL, condition, seed=seed, first_row=first_row)
    hidden_BL = ~state.revealed_BL
    log_p_AV = exact(state).log_probs_at(hidden_BL.flatten().nonzero().squeeze(1).cpu())

    def both(log_q_AV: Tensor, log_p_AV: Tensor) -> Tensor:
        log_p_AV = log_p_AV.to(log_q_AV.device)
        p_AV = log_p_AV.exp()
        # A token that the law rules out has no part in either.
        gap_A = torch.where(p_AV > 0, p_AV * (log_p_AV - log_q_AV), 0).sum(1)
        return torch.stack([gap_A, torch.special.entr(p_AV).sum(1)], dim=1)

    gap_B, entropy_B = mean_hidden(denoiser(state), both, log_p_AV, hidden_BL).double().cpu()
    return {"gap": gap_B.numpy(), "entropy": entropy_B.numpy()}


def _walked(workspace: Workspace, *, cell: Cell, first: int, rows: int) -> pa.Table:
    """Texts that the exact posterior draws along a model's path, with the model's table."""
    config = workspace.config
    exact = _exact(config.data)(workspace.model(cell.model).denoiser.table_VD.detach())
    length = workspace.rows(0, 1).shape[1]
    start = dsl.State.masked(rows, length, exact.table_VD.shape[1])
    sharpened = config.samples.sharpen(exact, cell)  # as are the model's own texts
    made = dsl.sample(
        sharpened, cell.walk, start, budget=cell.budget, seed=config.seed, first_row=first
    )
    nats_B = -exact.log_prob(made.tokens_BL) / length
    return pa.table({"tokens": lists(made.tokens_BL.numpy()), "nats": nats_B.numpy()})


class Law(RowQuestion):
    section, settings, optional = "law", LawConfig, True
    name, title = "law", "The network against the exact posterior"
    text = (
        "The text was drawn from a known law. Entropy: of the exact posterior, in nats per "
        "unrevealed token. Gap: the Kullback-Leibler divergence of the network's posterior from "
        "it, in the same states; ± is one standard error over rows."
    )
    table = (
        Column("model", "Model"),
        Column("state", "State"),
        Column("entropy", "Entropy", ".4f"),
        Column("gap", "Gap", ".4f"),
    )

    def check(self, config: Questions) -> None:
        asked, there = config.law, config.samples.rows
        require_paths("law.paths", asked.paths, config)
        if asked.paths and asked.rows > there:
            raise ValueError(f"law.rows is {asked.rows}, and samples.rows draws only {there} texts")
        if asked.paths and asked.rows < LEAST:
            why = f"the divergence along paths needs at least {LEAST} texts"
            raise ValueError(f"law.rows is {asked.rows}, and {why}; raise it or name no paths")

    def require(self, config: Questions, held_out: HeldOut, uri: str) -> None:
        law.read(Folder.at(config.data))

    def asked_rows(self, config: Questions, asked: str) -> int:
        return min(config.law.rows, config.likelihood.rows)

    def asked(self, config: Questions, kind: ModelKind) -> Mapping[str, OfRows]:
        return {
            condition.name: partial(_gaps, url=config.data, condition=condition, seed=config.seed)
            for condition in conditions(kind, config.states)
        }

    def of_model(self, survey: Survey, subject: Subject) -> Iterator[Part]:
        yield from super().of_model(survey, subject)
        config = survey.config
        for cell in _cells(survey):
            if cell.model == subject.name:
                for first, rows in chunks(config.law.rows, config.batch):
                    work = partial(_walked, cell=cell, first=first, rows=rows)
                    yield Part(group=_group(cell), first=first, work=work)

    def rows(self, survey: Survey, subject: Subject) -> Iterator[Row]:
        asked = conditions(subject.trained_as, survey.config.states)
        for condition, found in zip(asked, self.found(survey, subject).values(), strict=True):
            yield {
                "model": subject.name,
                "state": condition.name,
                **condition.place,
                **entries("entropy", mean(found["entropy"])),
                **entries("gap", mean(found["gap"])),
            }

    def tables(self, survey: Survey) -> Mapping[str, Table]:
        made = dict(super().tables(survey))
        if survey.config.law.paths:
            order = _exact(survey.config.data)(torch.eye(survey.held_out.vocabulary.size)).order
            made["law_paths"] = Table(
                title="The path against the network",
                note=f"Jensen-Shannon divergence of {order + 1}-grams from held-out text, in bits, "
                f"of {survey.config.law.rows:,} texts that the exact posterior draws along the "
                "path (what the path costs), and of as many of the model's own; the rest is due to "
                f"the network. {CONFIDENCE:.0%} intervals. Nats: -log P of the texts, per token; "
                "those of held-out text come first.",
                columns=(
                    *LABELS,
                    Column("budget", "Budget"),
                    Column("path_js", "Path", ".4f"),
                    Column("path_js_interval", "Interval"),
                    Column("model_js", "Model", ".4f"),
                    Column("model_js_interval", "Interval"),
                    Column("path_nats", "Nats, exact", ".4f"),
                    Column("model_nats", "Nats, model", ".4f"),
                ),
                rows=_path_rows(survey, order + 1),
            )
        return made

    def plots(self, survey: Survey, tables: Mapping[str, Table]) -> Iterable[Drawn]:
        png = by_state(tables["law"].rows, "gap", "network from exact posterior, nats")
        return [("law", self.title, png)]


def _gaps(denoiser: Denoiser, tokens_BL: Tensor, *, url: str, **how: Any) -> Columns:
    return gaps(denoiser, tokens_BL, exact=_exact(url)(denoiser.table_VD.detach()), **how)


def _cells(survey: Survey) -> list[Cell]:
    return [cell for cell in survey.walked if cell.path in survey.config.law.paths]


def _group(cell: Cell) -> str:
    return f"parts/law_walks/{cell.name}"


def _path_rows(survey: Survey, order: int) -> Rows:
    """Held-out text, which the law itself has drawn, and every cell."""
    config = survey.config
    exact = _exact(config.data)(torch.eye(survey.held_out.vocabulary.size))

    def tokens(group: str) -> np.ndarray:
        return matrix(survey.parts.read(group, ["tokens"])["tokens"], np.int64)[: config.law.rows]

    def nats(whose: str, texts_NL: np.ndarray) -> dict[str, float]:
        nats_N = -exact.log_prob(torch.from_numpy(texts_NL)).numpy() / texts_NL.shape[1]
        return entries(f"{whose}_nats", mean(nats_N))

    references_NL = tokens(f"samples/{REFERENCES}")
    made: list[Row] = [{"model": REAL, **nats("path", references_NL)}]
    for cell in _cells(survey):
        row: dict[str, Any] = labels(cell)
        for whose, group in (("path", _group(cell)), ("model", f"samples/{cell.name}")):
            texts_NL = tokens(group)
            row |= nats(whose, texts_NL)
            row |= estimated(
                f"{whose}_js", *scores(texts_NL, references_NL, order), seed=config.seed
            )
        made.append(row)
    return made
