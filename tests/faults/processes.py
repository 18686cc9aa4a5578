"""Real runs in processes of their own, and what is compared of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from infra import journal
from infra.checkpoints import committed
from tests.conftest import ROOT
from tests.infra.common import until
from tests.pipelines import tiny
from tests.pipelines.tiny import curve

STEPS, EVERY = 120, 20  # steps of a run, and from one checkpoint to the next
PATIENCE_S = 600.0  # the machine may be busy with other things
SETTINGS = [
    "init=scratch",
    "backbone.width=64", "backbone.blocks=2", "backbone.heads=2", "backbone.cond_dim=8",
    "converter.embed_dim=8", "converter.mask_prior=0.5",
    f"train.steps={STEPS}", "train.validate_every=60", "train.validation_microbatches=1",
    f"train.checkpoint.every={EVERY}",
    "train.stream.num_lanes=2", "train.stream.rows_per_microbatch=8",
    "train.optimizer.lr=0.001", "train.optimizer.warmup=5",
    "workers.count=2", "workers.parallel.threads=1",
]  # fmt: skip


class Run:
    """A verb in a process of its own, and the run directory, a path or a URL, that it works on."""

    def __init__(self, folder: Any, process: subprocess.Popen[bytes], log: Path) -> None:
        self.folder, self.process, self.log = folder, process, log

    @property
    def said(self) -> str:
        """Its stdout and stderr so far."""
        return self.log.read_text()

    @property
    def message(self) -> str:
        """The last line of them."""
        return (self.said.splitlines() or [""])[-1]

    @property
    def step(self) -> int:
        """The last step in the journal."""
        return max((int(row["step"]) for row in journal.read(str(self.folder))), default=0)

    @property
    def checkpoints(self) -> list[int]:
        return committed(f"{self.folder}/checkpoints")

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(PATIENCE_S)

    def end(self) -> None:
        """SIGTERM where it still runs."""
        if self.process.poll() is None:
            self.process.terminate()
            self.wait()

    def until(self, condition: Callable[[], Any]) -> Any:
        """What the condition holds once it holds something; the run must go on until then."""

        def met() -> Any:
            found = condition()
            assert found or self.process.poll() is None, self.said
            return found

        return until(met, PATIENCE_S)

    def recovered(self, step: int, since: float) -> float:
        """Seconds from `since` (of the epoch) until `step` had been done again."""

        def redone() -> float | None:
            rows = journal.read(str(self.folder))
            times = [row["time"] for row in rows if row["step"] == step and row["time"] > since]
            return times[0] if times else None

        return float(self.until(redone)) - since


Begin = Callable[..., AbstractContextManager[Run]]


def begin(address: str | None, data: Path | str, root: Path | str, logs: Path, *argv: str) -> Run:
    """`pipelines/finetune.py name=run` on a cluster, or with None on one of its own, in a process
    group of its own; what it says goes into the folder `logs`."""
    given = [f"data={data}", f"root={root}", "name=run"]
    given += [f"workers.cluster.address={address}"] if address else []
    log = logs / f"said-{time.time_ns()}.txt"
    # As its users run it: what makes the other tests quick is not to make this look quick.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_TRAIN_", "RAY_ADDRESS"))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "pipelines" / "finetune.py"), *given, *SETTINGS, *argv],
            cwd=ROOT, stdout=output, stderr=output, env=env, process_group=0,
        )  # fmt: skip
    return Run(root / "run" if isinstance(root, Path) else f"{root}/run", process, log)


@contextmanager
def finetune(address: str | None, data: Path, root: Path, *argv: str) -> Iterator[Run]:
    """The same on a disk; SIGTERM for it where the block ends first."""
    run = begin(address, data, root, root, *argv)
    try:
        yield run
    finally:
        run.end()


def assert_equal(run: Path, reference: Path) -> None:
    """Weights, average, optimizer and metrics, bit for bit; each step once."""
    tiny.assert_same(run, reference, STEPS)


def assert_close(run: Path, reference: Path) -> None:
    """The same to rounding, where another number of workers added up the gradients."""
    ours, theirs = tiny.tensors(run, STEPS), tiny.tensors(reference, STEPS)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.startswith(("model.", "ema.")):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    losses, wanted = ([row["loss"] for row in curve(path)] for path in (run, reference))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), rtol=1e-3, atol=0.0)
    assert [row["step"] for row in curve(run)] == list(range(1, STEPS + 1))
