"""A watch over a group of processes that step together: one that hangs would hang them all.

Each rank tells a store, once a second, which step it has finished and what it is at. Where a rank
has finished no step for `timeout_s`, it asks the store about all of them and says so in one
message. The collective that it is stuck in fails a little later, through the timeout of its
process group, and the error becomes that message; what does not fail (a collective of NCCL, a
thread that nobody answers) is ended with its process.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from infra.errors import InfraError

BEAT_S = 1.0
MARGIN_S = 5.0  # for what the others know, before the store may go with the first process to end

log = logging.getLogger(__name__)


class Word(NamedTuple):
    """What a rank says of itself."""

    beats: int
    finished: int
    doing: str


class Watch:
    """One rank's part in the watch."""

    def __init__(self, timeout_s: float, finished: int) -> None:
        self.report: str | None = None
        self._timeout_s = timeout_s
        self._finished, self._doing = finished, "starting"
        self._since = time.monotonic()
        self._closed = threading.Event()
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        # A connection of its own: the other one may be in use by what is stuck.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.set_timeout(timedelta(seconds=MARGIN_S))
        self._thread = threading.Thread(target=self._run, name="stall", daemon=True)
        self._thread.start()

    def doing(self, what: str) -> None:
        """What this rank is at from now on, in a word or two."""
        self._doing = what

    def finished(self, step: int) -> None:
        """A step is done; the time runs anew."""
        self._finished = step
        self._since = time.monotonic()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        self._tell(0)
        for beat in itertools.count(1):
            if self._closed.wait(BEAT_S):
                return
            self._tell(beat)
            if time.monotonic() - self._since > self._timeout_s:
                self.report = self._ask()
                log.critical("%s", self.report)
                break
        if not self._closed.wait(4 * MARGIN_S):
            for handler in logging.getLogger().handlers:
                handler.flush()
            os._exit(InfraError.exit_code)

    def _tell(self, beat: int) -> None:
        word = Word(beat, self._finished, self._doing)
        with suppress(RuntimeError):  # the store is gone, with the process that keeps it
            self._store.set(_key(self._rank), json.dumps(word))

    def _ask(self) -> str:
        """Which rank last finished which step, and what it is at."""
        before = [self._hear(rank) for rank in range(self._size)]
        time.sleep(2 * BEAT_S)
        after = [self._hear(rank) for rank in range(self._size)]
        said: dict[str, list[int]] = {}
        for rank, words in enumerate(zip(before, after, strict=True)):
            said.setdefault(_state(*words), []).append(rank)
        ranks = [
            f"{'ranks' if len(who) > 1 else 'rank'} {', '.join(map(str, who))} {what}"
            for what, who in said.items()
        ]
        return f"no step was finished for {self._timeout_s:.0f} s: {'; '.join(ranks)}"

    def _hear(self, rank: int) -> Word | None:
        if rank == self._rank:
            return Word(-1, self._finished, self._doing)
        try:
            there = self._store.check([_key(rank)])
            return Word(*json.loads(self._store.get(_key(rank)))) if there else None
        except RuntimeError:
            return None


@contextmanager
def watched(timeout_s: float, finished: int) -> Iterator[Watch]:
    """Watch over this group's steps, from the step `finished` on; in the block, a process group.

    What is raised inside once a report was made becomes an InfraError of it.
    """
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s + 2 * MARGIN_S))
    watch = Watch(timeout_s, finished)
    try:
        yield watch
    except Exception as error:
        watch.close()  # where the error is that of a timeout, the rank is just now asking around
        if watch.report is None:
            raise
        fix = "Look at that process and its machine; the same command resumes"
        raise InfraError("workers", watch.report, fix) from error
    finally:
        watch.close()


def _state(before: Word | None, after: Word | None) -> str:
    if after is None:
        return "does not answer"
    silent = before is not None and before.beats == after.beats >= 0
    state = "gives no sign of life" if silent else after.doing
    return f"last finished step {after.finished}, {state}"


def _key(rank: int) -> str:
    return f"stall/{rank}"
