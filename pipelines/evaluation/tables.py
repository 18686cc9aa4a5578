"""What an evaluation asks of its models, and the tables and plots it makes of the answers.

Shapes: N rows, L positions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dsl import likelihood
from infra import journal
from infra.storage import Folder
from pipelines.evaluation import measures, metrics
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.measures import (
    LikelihoodConfig,
    PathConfig,
    SamplesConfig,
    StatesConfig,
    View,
)
from pipelines.evaluation.metrics import Score
from pipelines.evaluation.subjects import Subject
from pipelines.report import SKIPPED, STDERR, Column, Plot, Row, Table, Text, plots
from pipelines.runs import say

UNIGRAM, REAL = "unigram", "real"  # what stands beside the models
TEXTS = 2  # of each model and path are shown; all of them are in samples/
NGRAMS = (1, 2, 3)
# What tells the rows of a table apart, in the names of their figures.
LABELS = ("model", "view", "state", "path", "budget")

LIKELIHOOD = (
    Column("model", "Model"),
    Column("view", "View"),
    Column("nats_per_token", "Nats per token", ".4f"),
    Column("bits_per_byte", "Bits per byte", ".4f"),
    Column("perplexity", "Perplexity", ".4g"),
    Column("meaning", "Which is"),
)
STATES = (
    Column("model", "Model"),
    Column("state", "State"),
    Column("nats", "Cross-entropy", ".4f"),
    Column("squared_error", "Squared error", ".4f"),
)
SAMPLES = (
    Column("model", "Model"),
    Column("path", "Path"),
    Column("budget", "Budget"),
    Column("calls", "Calls"),
    Column("words", "Words in corpus", ".3f"),
    *(Column(f"distinct_{n}", f"Distinct-{n}", ".3f") for n in NGRAMS),
    Column("entropy", "Entropy", ".3f"),
    Column("seconds", "Seconds a text", ".4f"),
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All models on the same rows with the same noise, `batch` rows at a time."""

    held_out: HeldOut
    subjects: Sequence[Subject]
    seed: int
    batch: int

    def likelihood(self, config: LikelihoodConfig) -> Table:
        """Every view of every model's likelihood; the unigram is the floor."""
        rows_NL = self.held_out.rows_NL[: config.rows]
        tokens_NL = torch.from_numpy(rows_NL)
        bytes_N = metrics.text_bytes(rows_NL, self.held_out.vocabulary)

        def row(model: str, view: View, nats_N: np.ndarray) -> Row:
            nats = metrics.mean(nats_N)
            bits = metrics.ratio(nats_N * rows_NL.shape[1] / math.log(2), bytes_N)
            perplexity = likelihood.perplexity(nats.value)
            say(f"{model}: {view.name} {nats.value:.4f} nats per token")
            return {
                "model": model,
                "view": view.name,
                **_entries("nats_per_token", nats),
                **_entries("bits_per_byte", bits),
                **_entries("perplexity", Score(perplexity, perplexity * nats.stderr)),
                "meaning": view.meaning,
            }

        rows = [row(UNIGRAM, measures.exact(), self.held_out.unigram.nats(rows_NL))]
        for subject in self.subjects:
            for view in measures.views(subject.kind, config, self.seed):
                nats_N = measures.nats(view, subject.denoiser, tokens_NL, batch=self.batch)
                rows.append(row(subject.name, view, nats_N))
        return Table(
            title="Likelihood of held-out text",
            note=f"{len(rows_NL):,} rows, {rows_NL.size:,} tokens, {bytes_N.sum():,} bytes. Every "
            "token counts, end marks too, which hold no byte. ± is one standard error over rows.",
            columns=LIKELIHOOD,
            rows=rows,
        )

    def states(self, config: StatesConfig, rows: int) -> Table:
        """The error of every model at the endpoints and, for those trained on it, at finite SNR."""
        tokens_NL = torch.from_numpy(self.held_out.rows_NL[:rows])
        return Table(
            title="Error by state",
            note="Per unrevealed token of the same rows: cross-entropy in nats, and |x - x̂|², "
            "which is E(SNR) where every token has one SNR.",
            columns=STATES,
            rows=[
                row for subject in self.subjects for row in self._states(subject, config, tokens_NL)
            ],
        )

    def _states(
        self, subject: Subject, config: StatesConfig, tokens_NL: torch.Tensor
    ) -> Iterator[Row]:
        name, denoiser = subject.name, subject.denoiser
        keys = {"seed": self.seed, "batch": self.batch}
        if subject.kind == "ar":
            yield {"model": name, "state": "any", SKIPPED: "ar sees the tokens before, no others"}
            return
        say(f"{name}: error by state")
        for share in config.revealed:
            errors = measures.errors_revealed(denoiser, tokens_NL, share, **keys)
            row = {"model": name, "state": f"revealed {share:g}", "share": share}
            yield row | _errors(errors, table_trained=subject.kind == "dsl")
        if subject.kind == "mdlm":
            yield {"model": name, "state": "SNR > 0", SKIPPED: "mdlm was not trained on it"}
            return
        for gamma in config.gammas:
            errors = measures.errors_at(denoiser, tokens_NL, gamma, **keys)
            row = {"model": name, "state": f"SNR {gamma:g}", "gamma": gamma}
            yield row | _errors(errors, table_trained=True)

    def samples(
        self, config: SamplesConfig, paths: Mapping[str, PathConfig], folder: Folder
    ) -> tuple[Table, list[Text]]:
        """Texts of every model on every path it can walk; all go into `folder`, some come back."""
        rows: list[Row] = []
        texts: list[Text] = []
        drawn_NL = self.held_out.unigram.draw(config.rows, self.held_out.manifest.length, self.seed)
        real_NL = self.held_out.rows_NL[: config.rows]
        for name, tokens_NL in ((UNIGRAM, drawn_NL), (REAL, real_NL)):
            rows.append({"model": name, **self._figures(tokens_NL)})
            texts += self._texts(name, tokens_NL)
        for subject in self.subjects:
            for path, entry in paths.items():
                for budget in entry.calls(self.held_out.manifest.length):
                    row, tokens_NL = self._walk(subject, config, path, entry, budget)
                    rows.append(row)
                    if tokens_NL is not None:
                        name = f"{subject.name} {path} {budget}"
                        texts += self._texts(name, tokens_NL)
                        lines = map(json.dumps, self._lines(tokens_NL))
                        content = "".join(f"{line}\n" for line in lines).encode()
                        folder.write_bytes(f"{name.replace(' ', '-')}.jsonl", content)
        table = Table(
            title="Texts",
            note=f"{config.rows:,} texts each at temperature {config.temperature:g} and nucleus "
            f"{config.nucleus.p:g}. Words in corpus: the share of words that occur in the training "
            "split. Entropy: of the tokens of a text, in nats.",
            columns=SAMPLES,
            rows=rows,
        )
        return table, texts

    def _walk(
        self, subject: Subject, config: SamplesConfig, path: str, entry: PathConfig, budget: int
    ) -> tuple[Row, np.ndarray | None]:
        length = self.held_out.manifest.length
        row = {"model": subject.name, "path": path, "budget": budget}
        if reason := measures.refusal(subject.kind, entry.path, budget, length):
            return row | {SKIPPED: reason}, None
        texts = measures.draw(
            subject.denoiser,
            entry.path,
            budget=budget,
            length=length,
            config=config,
            seed=self.seed,
            batch=self.batch,
        )
        say(f"{subject.name}: {path} {budget} in {texts.seconds:.1f} s")
        row |= {"calls": texts.calls, "seconds": texts.seconds / config.rows}
        return row | self._figures(texts.tokens_NL), texts.tokens_NL

    def _figures(self, tokens_NL: np.ndarray) -> dict[str, float]:
        held_out = self.held_out
        return {
            **_entries("words", metrics.word_share(tokens_NL, held_out.vocabulary, held_out.words)),
            **{f"distinct_{n}": metrics.distinct(tokens_NL, n) for n in NGRAMS},
            **_entries("entropy", metrics.entropy(tokens_NL)),
        }

    def _texts(self, heading: str, tokens_NL: np.ndarray) -> list[Text]:
        return [Text(heading, line["text"]) for line in self._lines(tokens_NL[:TEXTS])]

    def _lines(self, tokens_NL: np.ndarray) -> list[dict[str, Any]]:
        decode = self.held_out.vocabulary.decode
        return [
            {"row": number, "text": decode(tokens), "tokens": tokens}
            for number, tokens in enumerate(tokens_NL.tolist())
        ]


def draw_plots(subjects: Sequence[Subject], tables: Mapping[str, Table]) -> list[Plot]:
    """The plots there is something to show in."""
    runs = {s.name: journal.read(s.origin["run"]) for s in subjects if "run" in s.origin}
    by_snr = [row for row in tables["states"].rows if "gamma" in row]
    texts = [row for row in tables["samples"].rows if SKIPPED not in row]
    made = []
    if runs := {name: rows for name, rows in runs.items() if rows}:
        caption = "Training and validation loss of the runs that made the models"
        made.append(Plot("loss", caption, plots.losses(runs)))
    if walked := [row for row in texts if "calls" in row]:
        anchors = {row["model"]: row["words"] for row in texts if "calls" not in row}
        caption = "Words in corpus against calls; dotted: unigram draws and real text"
        made.append(Plot("quality", caption, plots.quality(walked, anchors)))
    if by_snr:
        made.append(Plot("snr", "Error over SNR", plots.errors_by_snr(by_snr)))
    return made


def figures(tables: Mapping[str, Table]) -> dict[str, float]:
    """Every finite number of the tables under a name that MLflow takes."""
    return {
        f"{'/'.join(str(row[label]) for label in LABELS if label in row)}/{column.key}": float(
            row[column.key]
        )
        for table in tables.values()
        for row in table.rows
        for column in table.columns
        if column.key in row.keys() - set(LABELS)
        and isinstance(row[column.key], int | float)
        and math.isfinite(row[column.key])
    }


def _errors(errors: measures.Errors, *, table_trained: bool) -> dict[str, float]:
    """Distances in a table that nobody trained would say nothing."""
    nats = _entries("nats", metrics.mean(errors.nats_N))
    squared = _entries("squared_error", metrics.mean(errors.squared_N))
    return nats | squared if table_trained else nats


def _entries(key: str, score: Score) -> dict[str, float]:
    return {key: score.value, key + STDERR: score.stderr}
