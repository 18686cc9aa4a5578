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
        # Whoever talks to the store may wait for ever: a process that is stopped closes nothing.
        threading.Thread(target=self._talk, name="stall-talk", daemon=True).start()
        self._thread = threading.Thread(target=self._run, name="stall", daemon=True)
        self._thread.start()

    def doing(self, what: str) -> None:
        """What this rank is at from now on, in a word or two."""
        self._doing = what

    def finished(self, step: int) -> None:
        """A step is done; the time runs anew."""
        self._finished, self._since = step, time.monotonic()
        self.report = None

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(BEAT_S):
            late_s = time.monotonic() - self._since - self._timeout_s
            if late_s > 0 and self.report is None:
                self.report = self._ask()
                log.critical("%s", self.report)
            if late_s > 4 * MARGIN_S:
                for handler in logging.getLogger().handlers:
                    handler.flush()
                os._exit(InfraError.exit_code)

    def _talk(self) -> None:
        for beat in itertools.count():
            word = Word(beat, self._finished, self._doing)
            try:
                self._store.set(_key(self._rank), json.dumps(word))
            except RuntimeError:  # the store is gone, with the process that keeps it
                return
            if self._closed.wait(BEAT_S):
                return

    def _ask(self) -> str:
        """Which rank last finished which step, and what it is at."""
        why = f"no step was finished for {self._timeout_s:.0f} s"
        heard: list[list[Word | None]] = []

        def listen() -> None:
            with suppress(RuntimeError):
                heard.append(self._hear())
                time.sleep(3 * BEAT_S)
                heard.append(self._hear())

        listening = threading.Thread(target=listen, name="stall-listen", daemon=True)
        listening.start()
        listening.join(2 * MARGIN_S)
        if len(heard) < 2:
            own = _state(None, Word(0, self._finished, self._doing))
            return f"{why}: rank 0 does not answer for all; rank {self._rank} {own}"
        said: dict[str, list[int]] = {}
        for rank, words in enumerate(zip(*heard, strict=True)):
            said.setdefault(_state(*words), []).append(rank)
        ranks = [
            f"{'ranks' if len(who) > 1 else 'rank'} {', '.join(map(str, who))} {what}"
            for what, who in said.items()
        ]
        return f"{why}: {'; '.join(ranks)}"

    def _hear(self) -> list[Word | None]:
        """What each rank said last, if anything."""
        keys = [_key(rank) for rank in range(self._size)]
        there = [key if self._store.check([key]) else None for key in keys]
        return [Word(*json.loads(self._store.get(key))) if key else None for key in there]


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
        return "has not begun"
    silent = before is not None and before.beats == after.beats
    state = "gives no sign of life" if silent else after.doing
    return f"last finished step {after.finished}, {state}"


def _key(rank: int) -> str:
    return f"stall/{rank}"
