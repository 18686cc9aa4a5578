"""Time what users pay for, each figure as a ratio that one run on one machine has measured.

    python pipelines/benchmark.py only=[sampler,train]
    python pipelines/benchmark.py quickstart
    python pipelines/benchmark.py owt only=[ingest] ingest.source='s3://bucket/owt/*.parquet'

Our code is compared with the limit of the machine (the bare network, a matrix product, the Parquet
library) and with a reference procedure that does what public samplers and losses do. Both sides
take turns, so that a machine that slows down slows both. Memory is the peak of a fresh process. A
bar is judged only at the default sizes, for which it was set.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra.console import say
from infra.storage import Folder
from pipelines import runs, verb
from pipelines.benchmarks import suite
from pipelines.benchmarks.settings import BenchmarkConfig
from pipelines.runs import Made, Run


@dataclass(kw_only=True)
class BenchmarkTask(runs.Task):
    """Time what is asked for, and write the report."""

    config: BenchmarkConfig
    verb: str = "benchmark"

    def prepare(self, folder: Folder) -> tuple[None, Mapping[str, str]]:
        suite.pin(self.config)
        self.host = suite.machine()
        return None, {f"machine.{key}": str(value) for key, value in self.host.items()}

    def work(self, run: Run) -> None:
        say(suite.machine_line(self.host))
        self.tables = dict(suite.measured(self.config))

    def conclude(self, run: Run) -> Made:
        result = {
            "tables": run.folder.url_of("report/benchmark.json"),
            "report": run.folder.url_of("report/report.html"),
            "bars": suite.figures(self.tables, "verdict"),
            "metrics": suite.figures(self.tables, "ratio"),
        }
        return Made(result, suite.report(self.config, self.tables, self.host).files())


def execute(config: BenchmarkConfig) -> dict[str, Any]:
    return runs.carry_out(BenchmarkTask(config=config))


def main() -> int:
    return verb.run("benchmark", BenchmarkConfig, plan=suite.plan, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
