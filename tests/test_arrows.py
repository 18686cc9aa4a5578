"""The arrows between the rooms, and the limits that keep each file readable."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LONGEST

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("dsl", "infra", "pipelines", "tests")
MAX_BYTES = 20_000
FORBIDDEN = {
    "dsl": {"infra", "pipelines", "ray", "mlflow", "fsspec", "s3fs", "yaml", "pyarrow"},
    "infra": {"dsl", "pipelines"},
}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every absolute import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, (node.module or "").split(".")[0]


def touches_the_world(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) wherever the code prints or looks at the environment."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="print")):
                yield node.lineno, "print"
            case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "getenv" as attr):
                yield node.lineno, f"os.{attr}"
            case ast.ImportFrom(module="os", names=names):
                for alias in names:
                    if alias.name in ("environ", "getenv"):
                        yield node.lineno, f"os.{alias.name}"


def violations(source: str, room: str) -> list[tuple[int, str]]:
    tree = ast.parse(source)
    found = [(line, name) for line, name in imports(tree) if name in FORBIDDEN[room]]
    return found + (list(touches_the_world(tree)) if room == "dsl" else [])


@pytest.mark.parametrize("room", FORBIDDEN)
def test_arrows_point_one_way(room: str) -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}": what
        for path in modules(room)
        for line, what in violations(path.read_text(), room)
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import infra.config",
        "from pipelines import training",
        "def f():\n    import ray.train",
        "print('hello')",
        "import os\nos.environ['A']",
        "from os import getenv",
    ],
)
def test_the_walk_sees(source: str) -> None:
    assert violations(source, "dsl")
    assert not violations("import torch\nfrom . import channel", "dsl")


def test_files_stay_readable() -> None:
    sizes = {
        str(path.relative_to(ROOT)): path.stat().st_size
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix in {".py", ".yaml", ".html", ".sh", ".md"} and path.is_file()
    }
    assert sizes, "no files were found: the test looks in the wrong place"
    assert not {name: size for name, size in sizes.items() if size > MAX_BYTES}


def test_the_longest_files_are_where_they_are_looked_for() -> None:
    assert not [name for row in LONGEST for name in row if not (ROOT / name).exists()]
