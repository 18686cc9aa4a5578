"""The pages that people open, in Chromium, on a phone and on a desk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsl
from dsl.state import State
from pipelines.film import Film
from pipelines.report import Column, Plot, Report, Table, Text, plots
from tests.pipelines import browser
from tests.services.debian import program

ASKED = """({
  width: view.innerWidth, needed: page.documentElement.scrollWidth,
  shown: page.body.innerText.length,
  requests: view.performance.getEntriesByType("resource").map(one => one.name)
    .filter(name => !name.startsWith("data:"))
})"""


def film() -> Film:
    """Of two sentences that are longer than any screen is wide."""
    vocabulary, length = dsl.Vocabulary.char(), 400
    torch.manual_seed(0)
    table_VD = torch.nn.functional.normalize(torch.randn(vocabulary.size, 4), dim=-1)
    ids_NL = torch.randint(1, vocabulary.size, (3, length))
    made = Film(vocabulary, {"model": "models:/" + "m" * 60, "seed": 0})
    dsl.sample(
        dsl.ExactDenoiser(table_VD, ids_NL), dsl.paths.SentenceSDE(gamma_max=9.0),
        State.masked(2, length, 4), budget=6, seed=0, recorders=[made],
    )  # fmt: skip
    return made


def report() -> Report:
    columns = tuple(Column(f"c{i}", f"Column {i}") for i in range(30))
    rows = [{f"c{i}": 12345 for i in range(30)}, {"c0": "models:/" + "m" * 60}]
    loss = plots.losses({"one": [{"step": step, "loss": 2.0 / step} for step in (1, 2, 3)]})
    assert loss
    return Report(
        name="page",
        title="Evaluation of models:/" + "m" * 60,
        subtitle="on text8",
        facts={"data": "s3://bucket/" + "d" * 120},
        tables={"wide": Table(title="Wide", note="", columns=columns, rows=rows)},
        plots=[Plot("loss", "Training loss", loss)],
        texts=[Text("samples", "t" * 500)],
        verdict="Better.",
        film=film().result(),
        topics={"Quality": {"wide", "loss"}},
        told=(),
    )


PAGES = {"report": lambda: report().html(), "film": lambda: film().page()}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_is_silent_and_asks_nobody(name: str, width: int, tmp_path: Path) -> None:
    program("chromium", "chromium")
    answer, console = browser.ask(PAGES[name](), tmp_path, width=width, asked=ASKED)
    assert console == []
    assert answer["shown"] > 100
    assert (answer["width"], answer["requests"]) == (width, [])
    assert answer["needed"] <= width
