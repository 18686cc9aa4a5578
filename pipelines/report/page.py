"""A report and its files. The HTML page loads nothing and escapes all text; it runs its own script
alone, which the page's policy names by its digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from pipelines.report.tables import Table, markdown

# A hint that the page's script shows only while what follows is wider than the page.
HINT = '<p class="hint faint" hidden>Wider than the page: scroll it sideways →</p>'
LEAST_SCALE = 0.6  # of a plot on a narrow page; smaller letters cannot be read


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
    the JSON beside the tables' rows.

    The page begins with `verdict` and `film` (see `pipelines.film.Film.result`). Then come the
    plots and tables that no topic names; those of `topics`, by title, are folded after them.
    `told`: facts that the page leaves out because a table shows them.
    """

    name: str
    title: str
    subtitle: str
    facts: Mapping[str, Any]
    tables: Mapping[str, Table]
    plots: Sequence[Plot]
    texts: Sequence[Text]
    verdict: str = ""
    film: Mapping[str, Any] | None = None
    topics: Mapping[str, Collection[str]] = field(default_factory=dict)
    told: Collection[str] = ()

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
        head = [f"# {self.title}", self.subtitle, *filter(None, [self.verdict])]
        tables = [f"## {t.title}\n\n{t.note}\n\n{markdown(t)}" for t in self.tables.values()]
        plots = [f"![{plot.caption}]({plot.name}.png)\n" for plot in self.plots]
        return "\n".join(["\n\n".join(head) + "\n", *tables, *plots])

    def html(self) -> str:
        """The page. What there is nothing of is left out."""
        named = {name for names in self.topics.values() for name in names}
        first = {*self.tables, *(plot.name for plot in self.plots)} - named
        parts = [
            f'<p class="verdict">{escape(self.verdict)}</p>' if self.verdict else "",
            f"<p>{escape(self.subtitle)}</p>",
            _film(self.film) if self.film else "",
            *self._part(first),
            *(_folded(of, list(self._part(names, of))) for of, names in self.topics.items()),
            _folded("Texts to read", list(_texts(self.texts))),
            _folded("Facts", list(_facts(self.facts, self.told))),
        ]
        return _document(self.title, "\n".join(filter(None, parts)))

    def _part(self, names: Collection[str], topic: str = "") -> Iterator[str]:
        """The plots of these names, then the tables. The topic's own title is not repeated."""
        yield from (_plot(plot) for plot in self.plots if plot.name in names)
        yield from (_table(table, topic) for key, table in self.tables.items() if key in names)


def film_page(title: str, film: Mapping[str, Any]) -> str:
    """A page of a film alone, which plays when it is opened."""
    return _document(title, _film({**film, "autoplay": True}))


def _document(title: str, content: str) -> str:
    script = _file("page.js")
    return Template(_file("template.html")).substitute(
        title=escape(title),
        style=_file("page.css"),
        content=content,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _film(film: Mapping[str, Any]) -> str:
    # "</script>" in a text would end the data; without "<" it cannot.
    data = json.dumps(film, separators=(",", ":")).replace("<", "\\u003c")
    return Template(_file("film.html")).substitute(film=data)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _folded(title: str, parts: Sequence[str]) -> str:
    """A topic that opens on demand; nothing where it is empty."""
    if not parts:
        return ""
    body = "\n".join(parts)
    return f"<details>\n<summary>{escape(title)}</summary>\n{body}\n</details>"


def _table(table: Table, topic: str) -> str:
    head = "" if table.title == topic else f"<h2>{escape(table.title)}</h2>\n"
    return f"{head}<p>{escape(table.note)}</p>\n{_grid(table.title, table.cells())}"


def _wide(label: str, content: str, kind: str = "") -> str:
    """What scrolls by itself where it is wider than the page, and says so."""
    attributes = f'class="wide{kind}" role="region" aria-label="{escape(label)}" tabindex="0"'
    return f"{HINT}\n<div {attributes}>{content}</div>"


def _grid(label: str, cells: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of text cells, heads first."""
    head, *rows = cells
    lines = "".join(_line("td", row, len(head)) for row in rows)
    return _wide(
        label,
        f"<table>\n<thead>{_line('th', head, len(head))}</thead>\n"
        f"<tbody>\n{lines}</tbody>\n</table>",
        kind,
    )


def _line(tag: str, cells: Sequence[str], columns: int) -> str:
    """A row, whose last cell spans the columns that are left."""
    span = f' colspan="{columns - len(cells) + 1}"' if columns > len(cells) else ""
    inside = [f"<{tag}>{escape(cell)}</{tag}>" for cell in cells[:-1]]
    return f"<tr>{''.join(inside)}<{tag}{span}>{escape(cells[-1])}</{tag}></tr>\n"


def _plot(plot: Plot) -> str:
    data, caption = base64.b64encode(plot.png).decode(), escape(plot.caption)
    width = int.from_bytes(plot.png[16:20])  # in pixels, as the head of a PNG says
    image = (
        f'<img alt="{caption}" style="min-width: {LEAST_SCALE * width:.0f}px" '
        f'src="data:image/png;base64,{data}">'
    )
    body = _wide(plot.caption, image)
    return f"<figure>{body}<figcaption>{caption}</figcaption></figure>"


def _texts(texts: Sequence[Text]) -> Iterator[str]:
    for heading, group in groupby(texts, lambda text: text.heading):
        yield f"<h3>{escape(heading)}</h3>"
        # Browsers drop a line feed right after <pre>, so each text gets one more.
        yield from (f"<pre>\n{escape(text.text)}</pre>" for text in group)


def _facts(facts: Mapping[str, Any], told: Collection[str]) -> Iterator[str]:
    shown = {key: value for key, value in facts.items() if key not in told}
    if lines := list(_leaves(shown)):
        yield _grid("Facts", [["Fact", "Value"], *lines], " facts")


def _leaves(facts: Mapping[str, Any], prefix: str = "") -> Iterator[list[str]]:
    """Dotted names and values."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield [f"{prefix}{key}", str(value)]
