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

import json
import sys
from typing import Any

from infra import tracking
from infra.storage import Folder
from pipelines import runs, verb
from pipelines.benchmarks import suite
from pipelines.benchmarks.settings import BenchmarkConfig
from pipelines.runs import RESULT, say


def execute(config: BenchmarkConfig) -> dict[str, Any]:
    with runs.opened(config, "benchmark") as held:
        return _execute(config, held.run)


def _execute(config: BenchmarkConfig, folder: Folder) -> dict[str, Any]:
    if folder.exists(RESULT):
        say(f"{folder.url} is finished; existing=restart would measure anew")
        return runs.result(folder, "run")
    suite.pin(config)
    host = suite.machine()
    tags = {f"machine.{key}": str(value) for key, value in host.items()}
    handle = runs.start(config, "benchmark", None, tags)
    say(f"run {folder.url}; metrics: {tracking.page(handle)}")
    say(suite.machine_line(host))
    with runs.ending(handle):
        tables = dict(suite.measured(config))
        found = suite.figures(tables, "ratio")
        handle = runs.publish(folder, handle, suite.report(config, tables, host).files(), found)
    result = {
        "run": folder.url,
        "run_id": handle.run_id,
        "tables": folder.url_of("report/benchmark.json"),
        "report": folder.url_of("report/report.html"),
        "bars": suite.figures(tables, "verdict"),
        "metrics": found,
    }
    folder.write_bytes(RESULT, json.dumps(result).encode())
    return result


def main() -> int:
    return verb.run("benchmark", BenchmarkConfig, plan=suite.plan, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
