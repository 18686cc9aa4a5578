"""Real runs in processes of their own, and what it takes to shoot at them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra import journal
from infra.checkpoints import committed, consolidate
from infra.storage import Folder

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 240, 40  # steps of a run, and from one checkpoint to the next
PATIENCE_S = 300.0  # the machine may be busy with other things
SETTINGS = [
    "init=scratch",
    "backbone.width=64", "backbone.blocks=2", "backbone.heads=2", "backbone.cond_dim=8",
    "converter.embed_dim=8", "converter.mask_prior=0.5",
    f"train.steps={STEPS}", "train.validate_every=120", "train.validation_microbatches=1",
    f"train.checkpoint.every={EVERY}",
    "train.stream.num_lanes=2", "train.stream.rows_per_microbatch=8",
    "train.optimizer.lr=0.001", "train.optimizer.warmup=5",
    "workers.count=2", "workers.parallel.threads=1",
]  # fmt: skip


class Run:
    """A verb in a process of its own, and the run directory that it works on."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], log: Path) -> None:
        self.folder, self.process, self.log = folder, process, log
        self.family: set[int] = set()

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
        with suppress(FileNotFoundError):
            lines = (self.folder / journal.NAME).read_bytes().splitlines()
            return len(lines) and max(row["step"] for row in journal.read(str(self.folder)))
        return 0

    @property
    def checkpoints(self) -> list[int]:
        return committed(str(self.folder / "checkpoints"))

    def workers(self) -> list[int]:
        """Pids of its training processes, by age; those of a local Ray."""
        self.family |= descendants(self.process.pid)
        return sorted(pid for pid in descendants(self.process.pid) if is_worker(pid))

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(2 * PATIENCE_S)

    def until(self, condition: Callable[[], Any]) -> Any:
        """What the condition holds once it holds something; the run must go on until then."""

        def met() -> Any:
            found = condition()
            assert found or self.process.poll() is None, self.said
            return found

        return until(met)

    def recovered(self, step: int, since: float) -> float:
        """Seconds from `since` (of the epoch) until the run had done `step` again."""

        def redone() -> float | None:
            rows = journal.read(str(self.folder))
            times = [row["time"] for row in rows if row["step"] == step and row["time"] > since]
            return times[0] if times else None

        return until(redone) - since


@contextmanager
def finetune(data: Path, root: Path, *argv: str, **env: str) -> Iterator[Run]:
    """`pipelines/finetune.py name=run`, for as long as the block; not what it leaves running."""
    given = [f"data={data}", f"root={root}", "name=run", *SETTINGS, *argv]
    log = root / f"said-{time.time_ns()}.txt"
    ours = {k: v for k, v in os.environ.items() if not k.startswith("RAY_TRAIN_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "pipelines" / "finetune.py"), *given],
            cwd=ROOT, stdout=output, stderr=output, env={**ours, **env},
        )  # fmt: skip
    run = Run(root / "run", process, log)
    try:
        yield run
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE_S)


def until(condition: Callable[[], Any], pause_s: float = 0.02) -> Any:
    """What the condition holds, once it holds something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s"
        time.sleep(pause_s)
    return found


def descendants(pid: int) -> set[int]:
    """The pids of a process's children, theirs, and so on."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                stat = (entry / "stat").read_text()
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def is_worker(pid: int) -> bool:
    """Whether a process is one of Ray Train's workers."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def alive(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def tensors(run: Path) -> dict[str, Tensor]:
    """All of the last checkpoint: weights, average, optimizer."""
    return consolidate(str(run / "checkpoints"), STEPS, "")


def curve(run: Path) -> list[dict[str, float]]:
    """Every metric that does not measure time."""
    rows = journal.read(Folder.at(str(run)))
    return [
        {
            k: v
            for k, v in row.items()
            if k != "time" and not k.startswith(("speed/", "checkpoint/"))
        }
        for row in rows
    ]


def assert_equal(run: Path, reference: Path) -> None:
    """Weights, average, optimizer and metrics, bit for bit; each step once."""
    ours, theirs = tensors(run), tensors(reference)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
    assert curve(run) == curve(reference)
    assert [row["step"] for row in curve(run)] == list(range(1, STEPS + 1))


def assert_close(run: Path, reference: Path) -> None:
    """The same to rounding, where another number of workers added up the gradients."""
    ours, theirs = tensors(run), tensors(reference)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.startswith(("model.", "ema.")):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    assert [row["step"] for row in curve(run)] == list(range(1, STEPS + 1))
    assert torch.allclose(
        torch.tensor([row["loss"] for row in curve(run)]),
        torch.tensor([row["loss"] for row in curve(reference)]),
        rtol=1e-3,
    )
