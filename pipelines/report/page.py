"""The one HTML page: no script, nothing fetched, and no text from outside taken for markup."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any, NamedTuple
from urllib.parse import quote

from pipelines.report.tables import Table

TEMPLATE = Path(__file__).with_name("template.html")


class Plot(NamedTuple):
    """A PNG and what it shows. `name` is unique in a report."""

    name: str
    caption: str
    png: bytes


class Text(NamedTuple):
    """What a model wrote, and under what heading. Neighbours of one heading stand together."""

    heading: str
    text: str


class Section(NamedTuple):
    """A part of the page, which the table of contents leads to."""

    id: str
    title: str  # in the table of contents
    body: str  # of trusted markup


def html(
    *,
    title: str,
    subtitle: str,
    tables: Mapping[str, Table],
    plots: Sequence[Plot],
    texts: Sequence[Text],
    facts: Mapping[str, Any],
) -> str:
    """The whole page. What there is nothing of has no part in it."""
    parts = {
        "Tables": [_table(key, table) for key, table in tables.items()],
        "Plots": [_plot(plot) for plot in plots],
        "More": [*_texts(texts), *_facts(facts)],
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        contents="\n".join(_links(name, part) for name, part in parts.items() if part),
        sections="\n".join(
            f'<section id="{section.id}">\n{section.body}\n</section>'
            for part in parts.values()
            for section in part
        ),
    )


def _id(kind: str, name: str) -> str:
    return f"{kind}-{quote(name, safe='')}"


def _links(name: str, sections: Sequence[Section]) -> str:
    links = " · ".join(f'<a href="#{s.id}">{escape(s.title)}</a>' for s in sections)
    return f"<li>{name}: {links}</li>"


def _table(key: str, table: Table) -> Section:
    body = f"<h2>{escape(table.title)}</h2>\n<p>{escape(table.note)}</p>\n{_grid(table.cells())}"
    return Section(_id("table", key), table.title, body)


def _grid(cells: Sequence[Sequence[str]]) -> str:
    """A table of text cells, heads first, that scrolls on its own where it is too wide."""
    head, *rows = cells
    lines = "".join(_line("td", row, len(head)) for row in rows)
    return (
        f'<div class="wide" tabindex="0"><table>\n<thead>{_line("th", head, len(head))}</thead>\n'
        f"<tbody>\n{lines}</tbody>\n</table></div>"
    )


def _line(tag: str, cells: Sequence[str], columns: int) -> str:
    span = f' colspan="{columns - len(cells) + 1}"' if columns > len(cells) else ""
    inside = [f"<{tag}>{escape(cell)}</{tag}>" for cell in cells[:-1]]
    return f"<tr>{''.join(inside)}<{tag}{span}>{escape(cells[-1])}</{tag}></tr>\n"


def _plot(plot: Plot) -> Section:
    data = base64.b64encode(plot.png).decode()
    caption = escape(plot.caption)
    body = (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
    return Section(_id("plot", plot.name), plot.name.replace("_", " "), body)


def _texts(texts: Sequence[Text]) -> Iterator[Section]:
    if texts:
        blocks = [
            f"<h3>{escape(heading)}</h3>\n{_preformatted(group)}"
            for heading, group in groupby(texts, lambda text: text.heading)
        ]
        yield Section("texts", "Texts", "\n".join(["<h2>Texts</h2>", *blocks]))


def _preformatted(texts: Iterator[Text]) -> str:
    # A line feed right after <pre> is dropped, so that one is given away first.
    return "\n".join(f"<pre>\n{escape(text.text)}</pre>" for text in texts)


def _facts(facts: Mapping[str, Any]) -> Iterator[Section]:
    if lines := list(_leaves(facts)):
        body = f"<h2>Facts</h2>\n{_grid([['Fact', 'Value'], *lines])}"
        yield Section("facts", "Facts", body)


def _leaves(facts: Mapping[str, Any], prefix: str = "") -> Iterator[list[str]]:
    """Dotted names and values."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield [f"{prefix}{key}", str(value)]
