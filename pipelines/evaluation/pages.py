"""The report of an evaluation: all tables, the papers' layouts of them, plots and some texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from infra import journal
from infra.config import to_tree
from pipelines.evaluation import layouts
from pipelines.evaluation.gate import Decision
from pipelines.evaluation.layouts import ENTROPY, QUALITY, Metric
from pipelines.evaluation.settings import REAL, UNIGRAM
from pipelines.evaluation.subjects import Subject
from pipelines.evaluation.tables import Tables
from pipelines.report import Column, Plot, Report, Row, Rows, Table, Text, plots, traces

TEXTS = 2  # of each source are shown; all of them are in the run directory
DIAGNOSTICS = (
    Column("model", "Model"),
    Column("kind", "Trained as"),
    Column("parameters", "Parameters"),
    Column("mean_cosine", "Table: mean cosine", ".3f"),
    Column("effective_rank", "effective rank", ".1f"),
    Column("beta", "Converter: beta", ".3f"),
    Column("version", "Version"),
)
GATE = (
    Column("role", "As"),
    Column("metric", "Metric"),
    Column("difference", "Difference", ".4g"),
    Column("low", "From", ".4g"),
    Column("high", "To", ".4g"),
    Column("verdict", "Which says"),
)


def report(tables: Tables, decision: Decision | None, time: Table) -> Report:
    """Everything that an evaluation has to say."""
    config, manifest = tables.found.config, tables.held_out.manifest
    likelihood, states = tables.likelihood(), tables.states()
    calibration, samples = tables.calibration(), tables.samples()
    converter = tables.converter()
    made = {
        "samples": samples,
        **layouts.lay_out(samples.rows, likelihood.rows, config.published),
        **({"gate": _gate(decision)} if decision else {}),
        "likelihood": likelihood,
        "states": states,
        "calibration": calibration,
        "ece": layouts.ece(calibration.rows),
        "converter": converter,
        "diagnostics": _diagnostics(tables.subjects),
        "time": time,
    }
    journals = {
        subject.name: journal.read(subject.origin["run"])
        for subject in tables.subjects
        if "run" in subject.origin
    }
    drawn = {
        **dict(_of_texts(samples.rows)),
        "reliability": ("Reliability by SNR", plots.reliability(calibration.rows)),
        "nll": ("Likelihood against the SNR of the bound", plots.nll(_bounds(likelihood.rows))),
        "snr": ("Error over SNR", plots.by_snr(states.rows, plots.ERRORS)),
        "converter": (
            "What the converter gives to the backbone",
            plots.by_snr(converter.rows, plots.CONVERTER),
        ),
        **dict(_of_traces(tables.traces())),
        "loss": ("Loss of the runs that made the models", plots.losses(journals)),
        "course": ("Converter and table in training", plots.courses(journals)),
    }
    return Report(
        name="evaluation",
        title=f"Evaluation {config.name}",
        subtitle=f"{config.split} split of {manifest.source} (digest {manifest.digest[:12]}), "
        f"V = {manifest.vocabulary.size}, L = {manifest.length}, seed {config.seed}",
        facts={
            "data": {
                "digest": manifest.digest,
                "split": config.split,
                "blocks": manifest.blocks,
                "references": f"the first {config.samples.rows} of the split in the order of seed "
                f"{config.seed}, kept in samples/references",
            },
            "information": {name: to_tree(found) for name, found in tables.profiles().items()},
            "models": {s.name: {**s.origin, **s.facts, "kind": s.kind} for s in tables.subjects},
        },
        tables={name: table for name, table in made.items() if table.rows},
        plots=[Plot(name, caption, png) for name, (caption, png) in drawn.items() if png],
        texts=list(_texts(tables)),
    )


def _of_texts(rows: Rows) -> Iterator[tuple[str, tuple[str, bytes | None]]]:
    """Every figure of merit against calls; of hybrid paths by split."""
    for metric in (*QUALITY, ENTROPY):
        look = {"label": metric.title, "bounds": metric.bounds, "anchors": _anchors(rows, metric)}
        yield (
            f"{metric.key}_by_calls",
            (
                f"{metric.title} against calls",
                plots.quality(rows, metric.key, **look),
            ),
        )
        caption = f"{metric.title} of hybrid paths by split"
        by_split = [row for row in rows if "split" in row]
        if len({tuple(row["split"]) for row in by_split}) > 1:
            png = plots.splits(by_split, metric.key, label=metric.title, show=metric.show)
            yield f"{metric.key}_by_split", (caption, png)


def _of_traces(rows: Rows) -> Iterator[tuple[str, tuple[str, bytes | None]]]:
    yield "schedule", ("What each step leaves masked, evident and revealed", traces.schedule(rows))
    yield "remasking", ("What each step takes back", traces.remasking(rows))
    yield "sharpening", ("How sure the posterior is by step", traces.sharpening(rows))


def _anchors(rows: Rows, metric: Metric) -> dict[str, float]:
    beside = {row["model"]: row for row in rows if row["model"] in (UNIGRAM, REAL)}
    return {name: row[metric.key] for name, row in beside.items() if metric.key in row}


def _bounds(rows: Rows) -> list[Row]:
    """The hybrid bound at every gamma*, and the bound at the endpoints to compare it with."""
    return [row for row in rows if "gamma_star" in row or row["view"] == "endpoint_bound"]


def _diagnostics(subjects: Sequence[Subject]) -> Table:
    return Table(
        title="Models",
        note="Rows of a DSL table are unit vectors: mean cosine over pairs, and the exponential of "
        "its spectral entropy, in [1, D]; a table that collapses shows in both (003 B.1).",
        columns=DIAGNOSTICS,
        rows=[{"model": s.name, "kind": s.kind, **s.origin, **s.facts} for s in subjects],
    )


def _gate(decision: Decision) -> Table:
    return Table(
        title="Gate to champion",
        note=decision.why,
        columns=GATE,
        rows=decision.rows(),
    )


def _texts(tables: Tables) -> Iterator[Text]:
    for source in (UNIGRAM, REAL, *(cell.name for cell in tables.found.walked)):
        for text in tables.found.texts(source, TEXTS):
            yield Text(source, text)
