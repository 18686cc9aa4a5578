"""Runs the benchmarks that a configuration names and puts their tables into one report."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from infra import parallel
from infra.config import to_tree
from infra.console import Meter, say
from pipelines.benchmarks.settings import BenchmarkConfig
from pipelines.report import Report, Table, markdown

CPUINFO = Path("/proc/cpuinfo")


def plan(config: BenchmarkConfig) -> dict[str, Any]:
    """What would be timed, for `--dry-run`."""
    pin(config)
    return {
        "run": config.folder.url,
        "machine": machine_line(machine()),
        "benchmarks": config.only,
        "rounds": config.rounds,
    }


def pin(config: BenchmarkConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def measured(config: BenchmarkConfig) -> Iterator[tuple[str, Table]]:
    """The tables by benchmark, each shown as soon as it is measured."""
    with parallel.flushed():  # as in training workers
        meter = Meter(f"benchmark {config.name}", len(config.only), "benchmarks")
        for name in meter.over(config.only):
            # Imported late: only `ingest` needs Ray.
            table = importlib.import_module(f"pipelines.benchmarks.{name}").run(config)
            say(f"\n{table.title}. {table.note}\n{markdown(table)}")
            yield name, table


def report(config: BenchmarkConfig, tables: Mapping[str, Table], host: dict[str, Any]) -> Report:
    # Other work on the machine is the usual cause of a surprising figure.
    facts = host | {"load_average_afterwards": machine()["load_average"]}
    return Report(
        name="benchmark",
        title=f"Benchmark {config.name}",
        subtitle=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC. {machine_line(facts)}",
        facts={"machine": facts, "config": to_tree(config)},
        tables=tables,
        plots=(),
        texts=(),
    )


def figures(tables: Mapping[str, Table], key: str) -> dict[str, Any]:
    """What stands under a key (`ratio`, `verdict`) of each row that has it, by table and row."""
    return {
        f"{name}/{row['key']}": row[key]
        for name, table in tables.items()
        for row in table.rows
        if key in row
    }


def machine() -> dict[str, Any]:
    """The processor, its cores and threads, the device, torch, and how busy the machine is."""
    device = parallel.device()
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 2),
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """The same in one line."""
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, device "
        f"{facts['device']}, torch {facts['torch']}, load average {facts['load_average']} before."
    )


def _cpu() -> str:
    if CPUINFO.exists():
        for field in CPUINFO.read_text().splitlines():
            if field.startswith("model name"):
                return field.partition(":")[2].strip()
    return platform.processor() or platform.machine()
