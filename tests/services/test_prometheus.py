"""Prometheus on the metrics of a real cluster: what the dashboard draws, and what wakes people up.

One run by two workers on a Ray head, first undisturbed, then with a store that refuses checkpoints,
then with a rank that hangs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import head
from tests.conftest import ROOT
from tests.faults.processes import PATIENCE_S, Run
from tests.infra.common import free_port
from tests.pipelines import tiny
from tests.services import prometheus
from tests.services.debian import program
from tests.services.prometheus import MONITORING, Prometheus

EVERY = 20  # steps from one checkpoint to the next
SETTINGS = [
    *tiny.SETTINGS["finetune"], "init=scratch", "train.steps=1000000", "name=run",
    f"train.checkpoint.every={EVERY}", "train.checkpoint.max_failures=1000",
    "workers.count=2",
]  # fmt: skip
# The alerts of a copy, so that a test need not wait for an hour. Ray exports gauges every 10 s.
SHORTER = {"> 3600": "> 30", "for: 1m": "for: 1s", "[5m]": "[40s]", "for: 10m": "for: 20s"}
# Drawn only where there is a GPU; and what moves only when workers come and go.
OF_GPUS = {"ray_dsl_mfu_percent", "ray_node_gpus_utilization", "ray_node_gram_used"}
STEADY = {"ray_dsl_workers"}


def drawn() -> dict[str, str]:
    """The query of each series on the dashboard by the name of its metric, for all runs."""
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    found = {}
    for query in (target["expr"] for panel in panels for target in panel["targets"]):
        (name,) = re.findall(r"\bray_\w+", query)
        found[name] = re.sub(r"\$\w+", ".+", query)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run that goes on for ever, as a job on a head of its own."""
    program("prometheus", "prometheus")
    data, state = tiny.shards(tmp_path / "data"), tmp_path / "cluster"
    head.up(state, dashboard_port=free_port(), num_cpus=4)
    log = tmp_path / "said.txt"
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "infra.cluster", "--state", state, "submit", "--",
                 "python", "pipelines/finetune.py", f"root={tmp_path}", f"data={data}", *SETTINGS],
                cwd=ROOT, stdout=output, stderr=output,
            )  # fmt: skip
        yield Run(tmp_path / "run", process, log)
    finally:
        head.down(state)
    process.wait(PATIENCE_S)


def test_a_run_is_seen_and_its_faults_are_told(run: Run, tmp_path: Path) -> None:
    run.until(lambda: run.step >= EVERY)
    folder = Path(head.Head.load(tmp_path / "cluster").folder)
    (ports,) = json.loads((folder / "prom_metrics_service_discovery.json").read_text())
    (target, *_) = (one for one in ports["targets"])
    configured = prometheus.configuration(tmp_path, target, SHORTER)
    server = Prometheus(configured)
    try:
        seen(server, run)
        a_store_that_fails(server, run)
        a_rank_that_hangs(server, run)
    finally:
        server.down()


def seen(server: Prometheus, run: Run) -> None:
    """Every series of the dashboard is there and moves, with the labels that its legends name."""
    run.until(lambda: server.ask("ray_dsl_step"))
    (labels,) = (labels for labels, _ in server.ask("ray_dsl_step"))
    assert labels.items() >= {"run": "run", "cluster": "local", "pod": "dsl-head"}.items()
    (scraped,) = server.targets()
    assert scraped["namespace"] == "dsl"
    for name, query in drawn().items():
        if name in OF_GPUS:
            assert not server.ask(query), f"{name} is there without a GPU"
        elif name in STEADY:
            assert [value for _, value in server.ask(query)] == [2.0]
        elif name != "ray_dsl_failed_checkpoints":
            run.until(lambda query=query: moved(server, query))


def moved(server: Prometheus, query: str) -> bool:
    return any(changes for _, changes in server.ask(f"changes(({query})[1h:1s])"))


def a_store_that_fails(server: Prometheus, run: Run) -> None:
    """Files lie where the next checkpoints belong."""
    run.until(lambda: not server.firing())
    folder, first = run.folder / "checkpoints", run.step // EVERY + 2
    taken = [folder / f"step_{EVERY * number:06d}" for number in range(first, first + 1000)]
    for path in taken:
        path.touch()
    run.until(lambda: {"StoreFailing", "CheckpointTooOld"} <= server.firing())
    assert moved(server, drawn()["ray_dsl_failed_checkpoints"])
    for path in taken:
        path.unlink()
    run.until(lambda: not server.firing())


def a_rank_that_hangs(server: Prometheus, run: Run) -> None:
    """It stands still for a while, and the rank that shows the run lives."""
    log = (run.folder / "logs/rank_00001.log").read_text()
    rank = int(re.findall(r"begins: process (\d+) ", log)[-1])
    os.kill(rank, signal.SIGSTOP)
    try:
        run.until(lambda: "RunStalled" in server.firing())
    finally:
        os.kill(rank, signal.SIGCONT)
    run.until(lambda: not server.firing())
