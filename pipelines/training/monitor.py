"""What a training run tells the outside, and what it is told: one object for the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from infra import parallel, stall
from infra.journal import Journal, Logger
from infra.preemption import Notice, notices
from pipelines.runs import Run

Show = Callable[[int, Mapping[str, float]], None]


@dataclass(kw_only=True)
class Monitor:
    """One rank's view of a run. Rank 0 writes the journal and asks whether the run is to stop;
    every rank reports validations, asks for its own machine, and says what it is doing.

    Args:
        what: the verb and the run, for the line of progress.
        began: when the run was first started, seconds since the epoch.
        stall_s: the longest that a step, a validation or the wait for a checkpoint may take.
        reports: called with each validation, on every rank at the same steps.
        show: called with all that is logged, on rank 0.
    """

    run: Run
    what: str
    began: float
    stall_s: float
    reports: Callable[[dict[str, float]], None]
    show: Show

    @contextmanager
    def following(self, done: int | None) -> Iterator[None]:
        """Around all steps after `done` (None: from the start), in a process group.

        Raises InfraError where another process has taken the run over, or a rank hangs.
        """
        first = parallel.world()[0] == 0
        self._logger = self._open(done) if first else None
        listening = notices(self.run.folder if first else None)
        try:
            with listening as self._latest, stall.detected(self.stall_s, done or 0) as self._rank:
                yield
        finally:
            if self._logger:
                self._logger.close()

    def _open(self, done: int | None) -> Logger:
        self.run.lease.confirm()
        permit = self.run.lease.confirm
        journal = Journal(self.run.folder, resume=done, permit=permit)
        return Logger(journal, self.run.handle)

    def doing(self, what: str) -> None:
        """What this rank does from now on, for whoever asks when it hangs."""
        self._rank.doing(what)

    def finished(self, step: int) -> None:
        """This rank has finished a step."""
        self._rank.finished(step)

    def notice(self) -> Notice:
        """The highest notice of any rank, the same on all: they save, or end, after one step."""
        return Notice(parallel.highest(self._latest()))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step into the journal, and show them."""
        if self._logger:
            self._logger.log(step, metrics)
            self.show(step, metrics)

    def sync(self) -> None:
        """Bring the journal up to date, before a checkpoint that relies on it is committed."""
        if self._logger:
            self.run.lease.confirm()
            self._logger.sync()

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report a validation, when the journal holds it."""
        self.sync()
        self.reports({**metrics, "step": step})
