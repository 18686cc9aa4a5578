"""Time what users pay for, each figure as a ratio that one run on one machine has measured.

    python pipelines/benchmark.py only=[sampler,train]
    python pipelines/benchmark.py quickstart
    python pipelines/benchmark.py owt only=[ingest] ingest.source='s3://bucket/owt/*.parquet'

Ours goes against the limit of the machine (the bare network, a matrix product, the Parquet
library) and against a reference procedure that does per step what public samplers and losses do,
turn by turn, so that a machine that slows down slows both. `paper` is computed and not measured.
Memory is the peak of a fresh process. A bar is judged at the sizes it was set at, which are the
defaults; at others the figure is only shown.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from infra import parallel
from infra.config import to_tree
from infra.storage import Folder
from pipelines import runs, verb
from pipelines.benchmarks import machine, timing
from pipelines.benchmarks.settings import BenchmarkConfig
from pipelines.report import Report, Table, markdown
from pipelines.runs import Made, Run, say


def plan(config: BenchmarkConfig) -> dict[str, Any]:
    """What would be timed, for `--dry-run`; the time that its products alone take here."""
    _pin(config)
    product = machine.Matmul(parallel.device())
    seconds_R = timing.interleaved({"product": product}, 3, parallel.device())["product"]
    rate = product.flops / float(seconds_R.min())
    rounds = config.rounds + 1  # one warms up
    work = {name: rounds * _module(name).cost(config) for name in config.only}
    return {
        "run": (Folder.at(config.root) / config.name).url,
        "machine": machine.line(machine.facts()),
        "rounds": config.rounds,
        **{f"{name}_flops": round(flops) for name, flops in work.items()},
        "gflops_per_s_of_this_machine": round(rate / 1e9),
        "minutes_at_least": round(sum(work.values()) / rate / 60, 2),
    }


@dataclass(kw_only=True)
class Benchmark(runs.Task):
    """Time what is asked for, and write the report."""

    config: BenchmarkConfig
    verb: str = "benchmark"

    def prepare(self, folder: Folder) -> tuple[None, Mapping[str, str]]:
        _pin(self.config)
        self.host = machine.facts()
        return None, {f"machine.{key}": str(value) for key, value in self.host.items()}

    def work(self, run: Run) -> None:
        say(machine.line(self.host))
        with parallel.flushed():  # as workers have it
            self.tables = dict(_measured(self.config))

    def conclude(self, run: Run) -> Made:
        result = {
            "tables": run.folder.url_of("report/benchmark.json"),
            "report": run.folder.url_of("report/report.html"),
            "bars": _bars(self.tables),
            "metrics": metrics(self.tables),
        }
        return Made(result, _report(self.config, self.tables, self.host).files())


def execute(config: BenchmarkConfig) -> dict[str, Any]:
    return runs.carry_out(Benchmark(config=config))


def _measured(config: BenchmarkConfig) -> Iterator[tuple[str, Table]]:
    """The tables one by one, each shown as soon as it is there."""
    for name in config.only:
        began = time.monotonic()
        table = _module(name).run(config)
        say(f"\n{table.title}. {table.note}\n{markdown(table)}")
        say(f"{name}: {runs.clock(time.monotonic() - began)} min")
        yield name, table


def _module(name: str) -> Any:
    """The room of a benchmark; imported late, for the networks are timed without Ray."""
    return importlib.import_module(f"pipelines.benchmarks.{name}")


def _pin(config: BenchmarkConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def _report(config: BenchmarkConfig, tables: Mapping[str, Table], host: dict[str, Any]) -> Report:
    # What else ran is the first thing to ask of a figure that surprises.
    facts = host | {"load_average_afterwards": machine.facts()["load_average"]}
    return Report(
        name="benchmark",
        title=f"Benchmark {config.name}",
        subtitle=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC. {machine.line(facts)}",
        facts={"machine": facts, "config": to_tree(config)},
        tables=tables,
        plots=(),
        texts=(),
    )


def metrics(tables: Mapping[str, Table]) -> dict[str, float]:
    """The ratios of all tables, by benchmark and key."""
    return {
        f"{name}/{row['key']}": float(row["ratio"])
        for name, table in tables.items()
        for row in table.rows
        if "ratio" in row
    }


def _bars(tables: Mapping[str, Table]) -> dict[str, str]:
    """The verdict on every bar."""
    return {
        f"{name}/{row['key']}": row["verdict"]
        for name, table in tables.items()
        for row in table.rows
        if "verdict" in row
    }


def main() -> int:
    return verb.run("benchmark", BenchmarkConfig, plan=plan, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
