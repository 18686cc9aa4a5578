"""How long it takes until anything happens: imports, and `--help` of every verb."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from infra.errors import InfraError
from pipelines.benchmarks import timing
from pipelines.benchmarks.results import Bar, ratio, table
from pipelines.benchmarks.settings import BenchmarkConfig
from pipelines.report import Row, Table
from pipelines.verb import VERBS

ROOT = Path(__file__).resolve().parents[2]


def cost(config: BenchmarkConfig) -> float:
    return 0.0


def run(config: BenchmarkConfig) -> Table:
    note = "Each in a fresh process, the operating system's cache of files warm."
    return table("Start-up", note, list(_rows(config)))


def _rows(config: BenchmarkConfig) -> Iterator[Row]:
    commands = {name: ["-c", f"import {name}"] for name in ("torch", "dsl")}
    commands |= {verb: [f"pipelines/{verb}.py", "--help"] for verb in VERBS}
    processes = {name: partial(_process, argv) for name, argv in commands.items()}
    timed = timing.interleaved(processes, config.rounds, torch.device("cpu"))
    bare, bar = timed["torch"], Bar("≤", 1.2, here=True)
    yield ratio("import", "import dsl", "import torch", timed["dsl"], bare, bar=bar)
    for verb in VERBS:
        what, beyond = f"--help of {verb}, beyond it", Bar("≤", 1.0, here=True, unit="s")
        yield ratio(f"help_{verb}", what, "import torch", timed[verb] - bare, bare, bar=beyond)


def _process(argv: list[str], number: int) -> None:
    # The code beside this file, installed or not.
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *argv]
    done = subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True)
    if done.returncode:
        why = f"ended with {done.returncode} ({done.stderr.strip()[-200:]})"
        raise InfraError(" ".join(argv), why, "Run it by itself")
