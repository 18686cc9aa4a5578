"""Modules joined into one file: nothing is missing, nothing means something else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from pipelines.exporting import assemble
from pipelines.exporting.package import CODE


def written(root: Path, monkeypatch: pytest.MonkeyPatch, **sources: str) -> SimpleNamespace:
    """The names of a file joined from a package of modules, of which `main` imports the others."""
    (root / "dsl").mkdir()
    for name, source in sources.items():
        (root / "dsl" / f"{name}.py").write_text(source)
    monkeypatch.setattr(assemble, "ROOT", root)
    made: dict[str, object] = {"__name__": "made"}
    source = assemble.assemble(root / "dsl" / "main.py")
    exec(compile(source, "main.py", "exec", dont_inherit=True), made)
    return SimpleNamespace(**made)


def test_the_file_of_a_model_stands_alone(tmp_path: Path) -> None:
    source = assemble.assemble(CODE)
    roots = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert roots - sys.stdlib_module_names <= {"torch", "numpy", "transformers"}
    # Undefined and unused names, and those that are defined twice.
    file = tmp_path / "modeling_dsl.py"
    file.write_text(source)
    linted = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(file)]
    ended = subprocess.run(linted, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


def test_a_module_that_is_named_is_named_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = written(
        tmp_path,
        monkeypatch,
        one="from math import floor\n\ndef made(x: 'float') -> int:\n    return floor(x)\n",
        two='"""Not kept."""\nfrom dsl import one\n\n__all__ = ["half"]\n\n'
        "def half(x: int) -> int:\n    return one.made(x / 2)\n",
        main='"""What it is."""\nfrom typing import Literal\nfrom dsl.two import half\n\n'
        'def kind(of: Literal["half"] = "half") -> int:\n    return half(43)\n',
    )
    assert made.kind() == 21
    assert made.__doc__ == "What it is."
    assert made.kind.__annotations__["of"] == Literal["half"]


@pytest.mark.parametrize(
    "two",
    [
        "x = 1\ndef f():\n    return x\n",
        "from dsl.one import x as f\n",
        "from dsl import one\ndef f():\n    x = one.x\n    return x\n",
        "from dsl import one\ndef f(one):\n    return one.x\n",
        "from dsl import one\ndef f(x):\n    return one.x\n",
        "from random import floor\n",
        "if True:\n    y = 1\n",
    ],
)
def test_what_cannot_be_joined_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two: str
) -> None:
    with pytest.raises(ValueError, match=r"local variable|clash|cannot be joined"):
        written(
            tmp_path,
            monkeypatch,
            one="from math import floor\nx = floor(1)\n",
            two=two,
            main="from dsl.one import x\nfrom dsl.two import f\n",
        )
