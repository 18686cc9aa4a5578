"""The verbs take the commands that the READMEs, the presets and their own docstrings show."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml

from infra import config
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
MODULES = sorted((ROOT / "pipelines").glob("*.py"))
READMES = [ROOT / "README.md", *sorted(ROOT.glob("[ip]*/**/README.md"))]
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


def calls(script: str, place: Path) -> list[list[str]]:
    """The arguments of every `python` that a script would run. No other program is found there."""
    (place / "bin").mkdir()
    for name, stub in (("python", NOTED), ("ray", SUBMITTED)):
        (place / "bin" / name).write_text(stub)
        (place / "bin" / name).chmod(0o755)
    (place / "notes").touch()
    env = {"PATH": str(place / "bin"), "NOTES": str(place / "notes")}
    given = ["/bin/bash", "-c", script]
    ran = subprocess.run(
        given, cwd=place, env=env, stdin=subprocess.DEVNULL, stderr=PIPE, text=True
    )
    assert "syntax error" not in ran.stderr
    assert "unexpected EOF" not in ran.stderr
    found, noted = [], iter((place / "notes").read_text().split("\0")[:-1])
    for count in noted:
        found.append([next(noted) for _ in range(int(count))])
    return found


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


@pytest.mark.parametrize("file", SHOWING, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_command_is_taken(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = []
    for arguments in calls(shown(file), tmp_path):
        name, given = module(arguments)
        if not name.startswith("pipelines."):
            continue
        main = importlib.import_module(name).main
        with mock.patch.object(sys, "argv", [name, *given, "--print-config"]):
            if main() != 0:
                refused.append((name, given, capsys.readouterr().err))
    assert not refused


@pytest.mark.parametrize("file", SHOWING, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_evaluation_draws_what_it_compares(file: Path, tmp_path: Path) -> None:
    for arguments in calls(shown(file), tmp_path):
        name, given = module(arguments)
        if name != "pipelines.evaluate":
            continue
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


def test_no_model_takes_the_place_of_another(tmp_path: Path) -> None:
    """Two runs with one name in the registry: what asks for it gets the later one."""
    asked = [(verb, [name]) for name, of in SECTIONS.items() for verb in TRAINING if verb in of]
    for number, file in enumerate(SHOWING):
        (place := tmp_path / str(number)).mkdir()
        found = [module(arguments) for arguments in calls(shown(file), place)]
        asked += [(name.removeprefix("pipelines."), given) for name, given in found]
    runs: dict[str, set[str]] = {}
    for verb, given in asked:
        if verb in TRAINING and (made := settings(TRAINING[verb], verb, given)).register:
            runs.setdefault(made.register, set()).add(made.name)
    assert {register: names for register, names in runs.items() if len(names) > 1} == {}


def test_there_are_commands(tmp_path: Path) -> None:
    """A guard of the guard: the shell and the patterns find them."""
    found = calls(shown(ROOT / "pipelines/presets/README.md"), tmp_path)
    assert ["pipelines/finetune.py", "frequent"] in [arguments[:2] for arguments in found]
    assert os.path.isfile(ROOT / found[0][0])
