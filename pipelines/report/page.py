"""A report and its files. The HTML page has no script, loads nothing, and escapes all text."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any, NamedTuple
from urllib.parse import quote

from pipelines.report.tables import Table, markdown

TEMPLATE = Path(__file__).with_name("template.html")


class Plot(NamedTuple):
    """A PNG and what it shows. `name` is unique in a report."""

    name: str
    caption: str
    png: bytes


class Text(NamedTuple):
    """A text that a model wrote. Neighbours with the same heading are shown together."""

    heading: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of a report. `name` is that of the JSON and the Markdown file; `facts` go into
    the JSON beside the tables' rows."""

    name: str
    title: str
    subtitle: str
    facts: Mapping[str, Any]
    tables: Mapping[str, Table]
    plots: Sequence[Plot]
    texts: Sequence[Text]

    def files(self) -> dict[str, bytes]:
        """The report's files by name."""
        return {
            f"{self.name}.json": self.json().encode(),
            f"{self.name}.md": self.markdown().encode(),
            **{f"{plot.name}.png": plot.png for plot in self.plots},
            "report.html": self.html().encode(),
        }

    def json(self) -> str:
        """Facts and rows; numbers that are not finite are null."""
        rows = {key: list(table.rows) for key, table in self.tables.items()}
        return json.dumps(_finite({**self.facts, **rows}), indent=1, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        tables = [f"## {t.title}\n\n{t.note}\n\n{markdown(t)}" for t in self.tables.values()]
        plots = [f"![{plot.caption}]({plot.name}.png)\n" for plot in self.plots]
        return "\n".join([f"# {self.title}\n\n{self.subtitle}\n", *tables, *plots])

    def html(self) -> str:
        """The page. A part without content is left out."""
        parts = {
            "Tables": [_table(key, table) for key, table in self.tables.items()],
            "Plots": [_plot(plot) for plot in self.plots],
            "More": [*_texts(self.texts), *_facts(self.facts)],
        }
        links = (
            f"<li>{name}: {' · '.join(map(_link, part))}</li>"
            for name, part in parts.items()
            if part
        )
        sections = (
            f'<section id="{section.id}">\n{section.body}\n</section>'
            for part in parts.values()
            for section in part
        )
        return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
            title=escape(self.title),
            subtitle=escape(self.subtitle),
            contents="\n".join(links),
            sections="\n".join(sections),
        )


class Section(NamedTuple):
    """A part of the page. `title` is its entry in the table of contents, `body` is HTML."""

    id: str
    title: str
    body: str


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _id(kind: str, name: str) -> str:
    return f"{kind}-{quote(name, safe='')}"


def _link(section: Section) -> str:
    return f'<a href="#{section.id}">{escape(section.title)}</a>'


def _table(key: str, table: Table) -> Section:
    body = f"<h2>{escape(table.title)}</h2>\n<p>{escape(table.note)}</p>\n{_grid(table.cells())}"
    return Section(_id("table", key), table.title, body)


def _grid(cells: Sequence[Sequence[str]]) -> str:
    """A table of text cells, heads first, that scrolls by itself if it is too wide."""
    head, *rows = cells
    lines = "".join(_line("td", row, len(head)) for row in rows)
    return (
        f'<div class="wide" tabindex="0"><table>\n<thead>{_line("th", head, len(head))}</thead>\n'
        f"<tbody>\n{lines}</tbody>\n</table></div>"
    )


def _line(tag: str, cells: Sequence[str], columns: int) -> str:
    """A row, whose last cell spans the columns that are left."""
    span = f' colspan="{columns - len(cells) + 1}"' if columns > len(cells) else ""
    inside = [f"<{tag}>{escape(cell)}</{tag}>" for cell in cells[:-1]]
    return f"<tr>{''.join(inside)}<{tag}{span}>{escape(cells[-1])}</{tag}></tr>\n"


def _plot(plot: Plot) -> Section:
    data, caption = base64.b64encode(plot.png).decode(), escape(plot.caption)
    body = (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
    return Section(_id("plot", plot.name), plot.name.replace("_", " "), body)


def _texts(texts: Sequence[Text]) -> Iterator[Section]:
    if texts:
        lines = ["<h2>Texts</h2>"]
        for heading, group in groupby(texts, lambda text: text.heading):
            lines.append(f"<h3>{escape(heading)}</h3>")
            # Browsers drop a line feed right after <pre>, so each text gets one more.
            lines += [f"<pre>\n{escape(text.text)}</pre>" for text in group]
        yield Section("texts", "Texts", "\n".join(lines))


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
