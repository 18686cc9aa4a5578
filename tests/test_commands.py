"""The verbs take the commands that the READMEs, the presets and their own docstrings show."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any
from unittest import mock
from unittest.mock import DEFAULT

import pytest
import yaml

from infra import config, head
from pipelines.evaluate import EvaluateConfig
from pipelines.evaluation import promotion
from pipelines.evaluation.questions.frontier import Frontier
from pipelines.evaluation.subjects import Subject
from pipelines.evaluation.survey import Survey
from pipelines.finetune import FinetuneConfig
from pipelines.kinds import DSL, KINDS
from pipelines.pretrain import PretrainConfig
from pipelines.sweep import SweepConfig
from pipelines.verb import VERBS

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "pipelines/presets").glob("*.yaml"))
ROOMS = ("dsl", "infra", "pipelines", "tests")
MODULES = [*sorted((ROOT / "pipelines").glob("*.py")), ROOT / "infra/head.py"]
READMES = [ROOT / "README.md", *sorted(f for r in ROOMS for f in (ROOT / r).rglob("README.md"))]
HEAD = ("up", "submit", "logs", "down")
SHOWN = {
    ".md": r"^```sh\n(.*?)^```$",
    ".yaml": r"^#   ([^\n]*)$",
    ".py": r"^    (python [^\n]*(?:\n {8}[^\n]*)*)",
}
# Stands for `python`, and notes what it is given: how many arguments, then each of them.
NOTED = '#!/bin/sh\nprintf "%s\\0" "$#" "$@" >> "$NOTES"\n'
# Stands for `ray job submit … -- python …`.
SUBMITTED = '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n'


def shown(file: Path) -> str:
    """What a file shows for the shell."""
    text = file.read_text()
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    # In a README also `finetune.py small`, in the middle of a line.
    within = re.findall(r"`(\w+\.py [^`\n]+)`", text) if file.suffix == ".md" else []
    found = re.findall(SHOWN[file.suffix], text, re.M | re.S)
    return "\n".join([*found, *(f"python pipelines/{command}" for command in within)])


@cache
def calls(file: Path) -> tuple[tuple[str, list[str]], ...]:
    """Every module that a file shows `python` to run, and the arguments it is given. No other
    program is found while the file's commands run."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "bin").mkdir()
        for name, stub in (("python", NOTED), ("ray", SUBMITTED)):
            (place / "bin" / name).write_text(stub)
            (place / "bin" / name).chmod(0o755)
        (place / "notes").touch()
        env = {"PATH": str(place / "bin"), "NOTES": str(place / "notes")}
        given = ["/bin/bash", "-c", shown(file)]
        ran = subprocess.run(
            given, cwd=place, env=env, stdin=subprocess.DEVNULL, stderr=PIPE, text=True
        )
        notes = (place / "notes").read_text()
    assert "syntax error" not in ran.stderr
    assert "unexpected EOF" not in ran.stderr
    found, noted = [], iter(notes.split("\0")[:-1])
    for count in noted:
        found.append(module([next(noted) for _ in range(int(count))]))
    return tuple(found)


def module(arguments: list[str]) -> tuple[str, list[str]]:
    """The module that `python` is asked to run, and what that is given."""
    if arguments[0] == "-m":
        return arguments[1], arguments[2:]
    return arguments[0].removesuffix(".py").replace("/", "."), arguments[1:]


def settings(config_type: type[Any], verb: str, given: list[str]) -> Any:
    """The configuration of a verb's command."""
    argv = [argument for argument in given if not argument.startswith("-")]
    folder = PRESETS[0].parent
    return config.load(config_type, verb=verb, argv=argv, presets=folder, verbs=VERBS)


SHOWING = [file for file in (*READMES, *PRESETS, *MODULES) if shown(file)]
SECTIONS = {file.stem: yaml.safe_load(file.read_text()) for file in PRESETS}
LENGTH = 64  # of rows that another preset prepares
TRAINING = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "sweep": SweepConfig}


EVALUATIONS = [
    pytest.param(given, id=f"{file.relative_to(ROOT)}-{number}")
    for file in SHOWING
    for number, (name, given) in enumerate(calls(file))
    if name == "pipelines.evaluate"
]


def taken(name: str, given: list[str]) -> bool:
    """Whether a module takes the arguments, and a head the job that they give it."""
    if name == "infra.cluster":
        with mock.patch.multiple(head, **dict.fromkeys(HEAD, DEFAULT)) as asked:
            asked["submit"].return_value = asked["logs"].return_value = 0
            code = head.main(given)
            jobs = [call.args[1] for call in asked["submit"].call_args_list]
        return code == 0 and all(job[0] == "python" and taken(*module(job[1:])) for job in jobs)
    main = importlib.import_module(name).main
    with mock.patch.object(sys, "argv", [name, *given, "--print-config"]):
        return main() == 0


@pytest.mark.parametrize("file", SHOWING, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_command_is_taken(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = [
        (name, given, capsys.readouterr().err)
        for name, given in calls(file)
        if name.startswith(("pipelines.", "infra.")) and not taken(name, given)
    ]
    assert not refused


@pytest.mark.parametrize("given", EVALUATIONS)
def test_every_evaluation_draws_what_it_compares(given: list[str]) -> None:
    asked = settings(EvaluateConfig, "evaluate", given)
    length = SECTIONS[given[0]].get("prepare", {}).get("length", LENGTH)
    rows: Any = SimpleNamespace(manifest=SimpleNamespace(length=length))
    subjects = [
        Subject(name=model, kind=model if model in KINDS else DSL.name, origin={}, facts={})
        for model in asked.models
    ]
    parts: Any = None
    survey = Survey(config=asked, parts=parts, held_out=rows, subjects=subjects, readers=())
    promotion.require(survey)
    if asked.frontier:
        Frontier().require(asked, rows, "")


def test_no_model_takes_the_place_of_another() -> None:
    """Two runs with one name in the registry: what asks for it gets the later one."""
    asked = [(verb, [name]) for name, of in SECTIONS.items() for verb in TRAINING if verb in of]
    for file in SHOWING:
        asked += [(name.removeprefix("pipelines."), given) for name, given in calls(file)]
    runs: dict[str, set[str]] = {}
    for verb, given in asked:
        if verb in TRAINING and (made := settings(TRAINING[verb], verb, given)).register:
            runs.setdefault(made.register, set()).add(made.name)
    assert {register: names for register, names in runs.items() if len(names) > 1} == {}


def test_there_are_commands() -> None:
    """A guard of the guard: the shell and the patterns find them."""
    found = calls(ROOT / "pipelines/presets/README.md")
    assert ("pipelines.finetune", "frequent") in [(name, given[0]) for name, given in found]
    assert [given[0] for _, given in calls(ROOT / "infra/head.py")] == [*HEAD]
    assert len(EVALUATIONS) > 5
