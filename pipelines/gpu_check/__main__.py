"""Check on this machine's GPU that everything is right, and measure how fast it is.

    python -m pipelines.gpu_check --out DIR
    python -m pipelines.gpu_check --out DIR --device cpu --small

Needs torch from 2.10 on, and neither Ray nor MLflow nor pyarrow. Each stage runs in a process of
its own under a time limit, on a GPU ten minutes in all. After each one DIR/gpu_check.json is
written, so that a check that is cut short still tells what it has found. The last line of stdout is
one JSON object. Exit code: 0 if no bar was missed and every stage finished, else 1; 2 for a wrong
command line or a DIR that cannot be written.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from infra.console import say
from infra.preemption import Terminated, terminable
from pipelines.gpu_check import SCRATCH
from pipelines.gpu_check.findings import FAIL, finished, table
from pipelines.report import markdown

# The stages in order, and their limits in seconds on a GPU.
LIMITS = {
    "facts": 40,
    "parity": 60,
    "bf16": 90,
    "resume": 150,
    "compile": 50,
    "train": 130,
    "sampler": 80,
}
LIMIT_CPU = 900  # of each stage: a CPU may be busy with other work
REPORT = "gpu_check.json"
Rows = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    if options.stage:
        _work(options)
        return 0
    report = options.out / REPORT
    rows: Rows = []
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        _write(report, rows)
    except OSError as error:
        say(f"--out cannot be written: {error}")
        return 2
    try:
        # Else a SIGTERM would leave the stage, which has a session of its own, without a limit.
        with terminable():
            for stage in options.only:
                rows += _outcome(stage, options)
                _write(report, rows)
    except Terminated:
        return 128 + signal.SIGTERM
    verdicts = Counter(row["verdict"] for row in rows if row["verdict"])
    failed = [f"{row['stage']}: {row['what']}" for row in rows if row["verdict"] == FAIL]
    print(markdown(table(rows)))
    print(json.dumps({"report": str(report), "verdicts": verdicts, "failed": failed}))
    return 1 if failed else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny network: two minutes on a CPU")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="STAGE")
    parser.add_argument("--stage", choices=LIMITS, help=argparse.SUPPRESS)  # in its own process
    options = parser.parse_args(argv)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("torch finds no GPU; give --device cpu --small to try the command without")
    return options


def _outcome(stage: str, options: argparse.Namespace) -> Rows:
    """What a stage has found in its own process, and how it ended."""
    found = options.out / f"{stage}.jsonl"
    found.unlink(missing_ok=True)
    began = time.monotonic()
    how, whole = _ended(stage, options)
    seconds = time.monotonic() - began
    say(f"{stage}: {how}, {seconds:.0f} s")
    last = finished(f"{how} after {seconds:.0f} s", whole=whole).row()
    lines = found.read_text().splitlines() if found.exists() else []
    return [{"stage": stage, **row} for row in (*map(json.loads, lines), last)]


def _ended(stage: str, options: argparse.Namespace) -> tuple[str, bool]:
    """Run a stage; how it ended, and whether it came to its end."""
    command = [sys.executable, "-m", __package__, "--out", options.out, "--stage", stage]
    command += ["--device", options.device, *(["--small"] if options.small else [])]
    changed = {"PYTHONFAULTHANDLER": "1"}  # a crash leaves the stack of each thread in the log
    if options.device == "cpu":
        changed["CUDA_VISIBLE_DEVICES"] = ""
    if options.small:  # a tiny network gains nothing from threads, which wait for busy cores
        changed["OMP_NUM_THREADS"] = "1"
    log = options.out / f"{stage}.log"
    with log.open("wb") as told:
        # A session of its own, so that what it starts ends with it.
        process = subprocess.Popen(
            command, stdout=told, stderr=told, env=os.environ | changed, start_new_session=True
        )
        try:
            code = process.wait(LIMITS[stage] if options.device == "cuda" else LIMIT_CPU)
        except subprocess.TimeoutExpired:
            return f"was ended at its limit (see {log})", False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            shutil.rmtree(options.out / SCRATCH, ignore_errors=True)
    return ("finished", True) if code == 0 else (f"failed with exit code {code} (see {log})", False)


def _work(options: argparse.Namespace) -> None:
    """Do a stage in this process, and write each finding at once.

    A figure without a bar that this device cannot show is left out.
    """
    import torch

    from infra import parallel
    from pipelines.gpu_check.settings import FULL, SMALL, Check

    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    check = Check(out=options.out, device=device, sizes=SMALL if options.small else FULL)
    stage = importlib.import_module(f"{__package__}.{options.stage}")
    with parallel.flushed(), (options.out / f"{options.stage}.jsonl").open("w") as file:
        for finding in stage.run(check):
            if finding.value is not None or finding.bar:
                file.write(json.dumps(finding.row()) + "\n")
                file.flush()


def _write(report: Path, rows: Rows) -> None:
    """Whole or not at all: what is there before stays until this is written."""
    unfinished = report.with_suffix(".partial")
    unfinished.write_text(json.dumps({"findings": rows}, indent=1))
    unfinished.replace(report)


if __name__ == "__main__":
    sys.exit(main())
