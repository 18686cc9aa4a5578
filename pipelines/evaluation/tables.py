"""The tables of an evaluation, made from what its parts say; plots are drawn of their rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dsl import likelihood
from dsl.likelihood import Profile
from dsl.paths import Information
from pipelines.evaluation import judge, measures, metrics
from pipelines.evaluation.cells import Cell, cells, longest
from pipelines.evaluation.found import Found
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.measures import AtSNR, Condition, Revealed
from pipelines.evaluation.metrics import NGRAMS, Score
from pipelines.evaluation.settings import REAL, UNIGRAM, EvaluateConfig
from pipelines.evaluation.stages import Stage
from pipelines.evaluation.subjects import Subject
from pipelines.kinds import KINDS
from pipelines.report import SKIPPED, STDERR, Column, Row, Table

MEASURED = ("likelihood", "states", "calibration", "converter", "samples")
# What tells the rows of a table apart, in the names of their figures.
LABELS = ("model", "view", "state", "path", "split", "budget")

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
CALIBRATION = (
    Column("model", "Model"),
    Column("state", "State"),
    Column("ece", "ECE", ".4f"),
    Column("accuracy_of_all", "Accuracy", ".4f"),
    Column("confidence_of_all", "Confidence", ".4f"),
)
CONVERTER = (
    Column("model", "Model"),
    Column("state", "State"),
    Column("converter_entropy", "Entropy, nats", ".3f"),
    Column("mask_weight", "Weight of [MASK]", ".4f"),
    Column("token_weight", "Weight of the token", ".4f"),
)
SAMPLES = (
    Column("model", "Model"),
    Column("path", "Path"),
    Column("budget", "Budget"),
    Column("calls", "Calls a text", ".1f"),
    Column("words", "Words in corpus", ".3f"),
    *(Column(f"distinct_{n}", f"Distinct-{n}", ".3f") for n in NGRAMS),
    Column("repetition", "Repetition", ".3f"),
    Column("entropy", "Entropy", ".3f"),
    Column("seconds", "Seconds a text", ".4f"),
)
OWN = (Column("split", "Split"), Column("nucleus", "Nucleus"))  # of some paths only
MAUVE = (
    Column("mauve", "MAUVE", ".3f"),
    Column("mauve_spread", "k-means spread", ".3f"),
)
JUDGED = (
    Column("perplexity", "Generative perplexity", ".2f"),
    Column("judged_bits_per_byte", "Judged bits per byte", ".3f"),
)
TIME = (
    Column("stage", "Stage"),
    Column("jobs", "Jobs"),
    Column("made", "Made just now"),
    Column("work", "Seconds of work", ".1f"),
    Column("wall", "Seconds waited just now", ".1f"),
)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Everything that the parts of an evaluation say, as tables."""

    found: Found
    held_out: HeldOut
    subjects: Sequence[Subject]

    def likelihood(self) -> Table:
        """Every view of every model's likelihood; the unigram is the floor."""
        config = self.found.config
        rows_NL = self.held_out.rows_NL[: config.likelihood.rows]
        bytes_N = metrics.text_bytes(rows_NL, self.held_out.vocabulary)

        def row(model: str, view: measures.View) -> Row:
            nats_N = self.found.nats(model, view.name)
            nats = metrics.mean(nats_N)
            bits = metrics.ratio(nats_N * rows_NL.shape[1] / math.log(2), bytes_N)
            perplexity = likelihood.perplexity(nats.value)
            return {
                "model": model,
                "view": view.name,
                **_entries("nats_per_token", nats),
                **_entries("bits_per_byte", bits),
                **_entries("perplexity", Score(perplexity, perplexity * nats.stderr)),
                "meaning": view.meaning,
                **({} if view.gamma_star is None else {"gamma_star": view.gamma_star}),
            }

        rows = [row(UNIGRAM, measures.exact())]
        for subject in self.subjects:
            views = measures.views(subject.kind, config.likelihood, config.seed)
            rows += [row(subject.name, view) for view in views]
        return Table(
            title="Likelihood of held-out text",
            note=f"{len(rows_NL):,} rows, {rows_NL.size:,} tokens, {bytes_N.sum():,} bytes. Every "
            "token counts, end marks too, which hold no byte. ± is one standard error over rows.",
            columns=LIKELIHOOD,
            rows=rows,
        )

    def states(self) -> Table:
        """The error of every model at the endpoints and, for those trained on it, at finite SNR."""
        return Table(
            title="Error by state",
            note="Per unrevealed token of the same rows: cross-entropy in nats, and |x - x̂|², "
            "which is E(SNR) where every token has one SNR.",
            columns=STATES,
            rows=[row for subject in self.subjects for row in self._states(subject)],
        )

    def _states(self, subject: Subject) -> Iterator[Row]:
        name, kind = subject.name, KINDS[subject.kind]
        for condition in measures.conditions(subject.kind, self.found.config.states):
            errors = self.found.errors(name, condition)
            # Distances in a table that nobody trained would say nothing.
            squared = _entries("squared_error", metrics.mean(errors["squared"]))
            yield {
                "model": name,
                "state": condition.name,
                **_snr(condition),
                **_entries("nats", metrics.mean(errors["nats"])),
                **(squared if kind.finite_snr else {}),
            }
        if kind.causal:
            why = f"{kind.name} sees the tokens before, no others"
            yield {"model": name, "state": "any", SKIPPED: why}
        elif not kind.finite_snr:
            why = f"{kind.name} was not trained on it"
            yield {"model": name, "state": "SNR > 0", SKIPPED: why}

    def calibration(self) -> Table:
        """How far confidence is from accuracy, by SNR."""
        return Table(
            title="Calibration under teacher forcing",
            note="The likeliest token at every position, in ten bins of equal width. ECE: expected "
            "calibration error.",
            columns=CALIBRATION,
            rows=[
                row
                for s in self.subjects
                if KINDS[s.kind].finite_snr
                for row in self._calibration(s)
            ],
        )

    def _calibration(self, subject: Subject) -> Iterator[Row]:
        if not self.found.config.states.gammas:
            return
        for gamma, bins in self.found.calibration(subject.name).items():
            count_K, sure_K, right_K = bins["count"], bins["confidence"], bins["right"]
            filled_K = np.maximum(count_K, 1)
            empty_K = count_K == 0
            yield {
                "model": subject.name,
                "state": AtSNR(snr=gamma).name,
                "gamma": gamma,
                "ece": float(np.abs(right_K - sure_K).sum() / count_K.sum()),
                "accuracy_of_all": float(right_K.sum() / count_K.sum()),
                "confidence_of_all": float(sure_K.sum() / count_K.sum()),
                "count": count_K.tolist(),
                "confidence": _or_none(sure_K / filled_K, empty_K),
                "accuracy": _or_none(right_K / filled_K, empty_K),
            }

    def converter(self) -> Table:
        """How much of the evidence reaches the backbone."""
        return Table(
            title="What the converter gives to the backbone",
            note="Of the mixture of input embeddings at each token: the entropy of its weights, "
            "the weight of [MASK], which hides evidence, and that of the token which is there.",
            columns=CONVERTER,
            rows=[row for subject in self.subjects for row in self._converter(subject)],
        )

    def _converter(self, subject: Subject) -> Iterator[Row]:
        for condition in measures.readings(subject.kind, self.found.config.states):
            read = self.found.reading(subject.name, condition)
            yield {
                "model": subject.name,
                "state": condition.name,
                **_snr(condition),
                **_entries("converter_entropy", metrics.mean(read["entropy"])),
                **_entries("mask_weight", metrics.mean(read["mask"])),
                **_entries("token_weight", metrics.mean(read["token"])),
            }

    def profiles(self) -> dict[str, Information]:
        """By model, how many nats lie below which SNR: a support, a grid or a proposal, to be named
        in a configuration as it stands (003 eq. 3)."""
        config = self.found.config.states
        if 0.0 not in config.revealed or not config.gammas:
            return {}
        gammas = sorted(config.gammas)
        places = (Revealed(share=0.0), *(AtSNR(snr=gamma) for gamma in gammas))
        made = {}
        for subject in self.subjects:
            if KINDS[subject.kind].finite_snr:
                errors = [self.found.errors(subject.name, at)["squared"] for at in places]
                profile = Profile((0.0, *gammas), torch.from_numpy(np.stack(errors)))
                made[subject.name] = profile.information()
        return made

    def samples(self) -> Table:
        """What is to be said of the texts of every cell, and of what stands beside them."""
        config = self.found.config
        rows: list[Row] = [{"model": name, **self._texts(name)} for name in (UNIGRAM, REAL)]
        for cell in self.found.walked:
            row: dict[str, Any] = {"model": cell.model, "path": cell.path}
            if cell.split:
                row["split"] = list(cell.split)
            if cell.nucleus:
                row["nucleus"] = cell.nucleus.p
            rows.append(row | {"budget": cell.budget} | self._drawn(cell))
        rows += self._refused()
        each = f"{config.samples.repeats} x " if config.samples.repeats > 1 else ""
        own = tuple(column for column in OWN if any(column.key in row for row in rows))
        asked = (MAUVE if config.mauve else ()) + (JUDGED if config.judge else ())
        return Table(
            title="Texts",
            note=f"{each}{config.samples.rows:,} texts each at temperature "
            f"{config.samples.temperature:g} and nucleus {config.samples.nucleus.p:g} "
            f"({config.samples.nucleus.convention}). Words in corpus: the share of words that "
            "occur in the training split. Repetition: the share of "
            f"{metrics.REPEATED}-grams of tokens that a text had before. Entropy: of the tokens of "
            "a text, in nats. Seconds a text: of one process, "
            f"{config.batch} at a time. {self._strangers()}",
            columns=SAMPLES[:2] + own + SAMPLES[2:4] + asked + SAMPLES[4:],
            rows=rows,
        )

    def _strangers(self) -> str:
        config, said = self.found.config, []
        if config.mauve:
            said.append(
                f"MAUVE on features of {config.mauve.featurizer.label}, mean over "
                f"{config.mauve.seeds} k-means seeds (spread: their standard deviation); ± is the "
                "standard error over repeats, where there are several."
            )
        if config.judge:
            said.append(f"Generative perplexity by {config.judge.label}.")
        return " ".join(said)

    def _refused(self) -> Iterator[Row]:
        """Why paths were not walked, a row for each model and reason."""
        length, config = self.held_out.manifest.length, self.found.config
        reasons: dict[tuple[str, str], dict[str, None]] = {}
        for cell in cells(self.found.kinds, config.paths, length):
            kind = KINDS[self.found.kinds[cell.model]]
            if reason := kind.refusal(cell.walk, cell.budget, length):
                reasons.setdefault((cell.model, reason), {})[cell.path] = None
        for (model, reason), paths in reasons.items():
            yield {"model": model, "path": ", ".join(paths), SKIPPED: reason}

    def _drawn(self, cell: Cell) -> dict[str, Any]:
        calls_N = self.found.calls(cell.name)
        return {
            "calls": float(calls_N.mean()),
            **self._texts(cell.name),
            "seconds": self.found.seconds(cell.name) / len(calls_N),
        }

    def _texts(self, source: str) -> dict[str, Any]:
        read, config = self.found.read(source), self.found.config
        whole = self.found.whole(source)
        row = {
            **_entries("words", metrics.ratio(read["known"], read["words"])),
            **_entries("entropy", metrics.mean(read["entropy"])),
            **_entries("repetition", metrics.mean(read["repetition"])),
        }
        if whole:
            row |= {k: float(np.mean([w[k] for w in whole])) for k in whole[0] if k != "mauve"}
        if whole and whole[0].get("mauve"):
            per_seed_RS = np.array([repeat["mauve"] for repeat in whole])
            row |= _entries("mauve", metrics.mean(per_seed_RS.mean(1)))
            row["mauve_spread"] = float(per_seed_RS.std(1, ddof=1).mean())
        if config.judge:
            verdict = self.found.verdict(source)
            row |= _entries("perplexity", judge.perplexity(verdict))
            row |= _entries("judged_bits_per_byte", judge.bits_per_byte(verdict))
        return row

    def traces(self) -> list[Row]:
        """What the recorders saw, step by step, of each cell that was traced."""
        if not self.found.config.samples.traced:
            return []
        return [
            {"model": cell.model, "path": cell.path, "budget": cell.budget}
            | ({"split": list(cell.split)} if cell.split else {})
            | {k: v for seen in self.found.trace(cell).values() for k, v in seen.items()}
            for cell in longest(self.found.walked)
        ]


def time_table(stages: Iterable[Stage], *, wall: float, config: EvaluateConfig) -> Table:
    """Where the time went since the command began, and how much of it was work.

    Where an earlier attempt has done some of the work, its share of this time is not known.
    """
    processes = max(config.workers.count, 1)
    stages = list(stages)
    work = sum(stage.work for stage in stages)
    busy = f", busy {100 * work / processes / wall:.1f} % of the time"
    whole = all(stage.made == stage.jobs for stage in stages)
    rows = [vars(stage) | {"stage": stage.name} for stage in stages]
    rows.append({"stage": "everything", "work": work, "wall": wall})
    return Table(
        title="Time",
        note=f"Processes: {processes}{busy if whole else ''}. Everything: from the beginning of "
        "this command to its report.",
        columns=TIME,
        rows=rows,
    )


def figures(tables: Mapping[str, Table]) -> dict[str, float]:
    """Every finite number of the tables of measurements, under a name that MLflow takes."""
    return {
        f"{'/'.join(_label(row[label]) for label in LABELS if label in row)}/{column.key}": float(
            row[column.key]
        )
        for table in map(tables.get, MEASURED)
        if table
        for row in table.rows
        for column in table.columns
        if column.key in row.keys() - set(LABELS)
        and isinstance(row[column.key], int | float)
        and math.isfinite(row[column.key])
    }


def _label(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def _snr(condition: Condition) -> dict[str, float]:
    return {"gamma": condition.snr} if isinstance(condition, AtSNR) else {}


def _or_none(values_K: np.ndarray, empty_K: np.ndarray) -> list[float | None]:
    return [None if empty else v for v, empty in zip(values_K.tolist(), empty_K, strict=True)]


def _entries(key: str, score: Score) -> dict[str, float]:
    return {key: score.value, key + STDERR: score.stderr}
