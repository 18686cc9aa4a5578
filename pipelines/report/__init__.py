"""Reports: tables for people and programs, plots, and one self-contained HTML page of everything.

A table is a list of plain rows, which is what the JSON file holds. How a value is shown is said
once, in its column, so that terminal, Markdown and HTML agree.
"""

from pipelines.report.page import Plot, Report, Text
from pipelines.report.tables import BOUND, SKIPPED, STDERR, Column, Row, Rows, Table, markdown

__all__ = [
    "BOUND",
    "SKIPPED",
    "STDERR",
    "Column",
    "Plot",
    "Report",
    "Row",
    "Rows",
    "Table",
    "Text",
    "markdown",
]
