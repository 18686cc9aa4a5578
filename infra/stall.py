"""Detects that a group of processes that step together stands still, and names the rank to blame.

Each rank tells the group's store, once a second, which step it has finished and what it does.
Where a rank has done one thing (a step, a validation, the wait for data or for a checkpoint) for
longer than `timeout_s`, it reads what all have told and says so in one message. With gloo, the
collective that it waits in fails a little later, through the timeout of its process group, and that
error becomes the message. What does not fail by itself (a collective of NCCL, a wait without a
timeout) is ended with its process, whose log then has the message.

A barrier with a timeout of its own would name ranks too, but only at the barrier: NCCL ends a
process in whatever collective it waits, before that process could ask which rank is missing.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from infra.errors import InfraError, PeerLost

BEAT_S = 1.0
MARGIN_S = 5.0  # to read what others have told, before the store ends with the process it is in

log = logging.getLogger(__name__)


class Status(NamedTuple):
    """What a rank tells of itself; `beats` rises for as long as its process runs."""

    beats: int
    finished: int
    doing: str


class Rank:
    """This process, as a member of its group."""

    def __init__(self, timeout_s: float, finished: int) -> None:
        self.report: str | None = None
        self._timeout_s = timeout_s
        self._finished, self._doing = finished, "starting"
        self._since = time.monotonic()
        self._closed, self._asks = threading.Event(), threading.Event()
        self._heard: list[list[Status | None]] = []  # of all ranks, once a second while it asks
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        # Private: torch gives the store of a group that another library has made in no other way.
        # A connection of its own, because what stands still may be using the other one.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.set_timeout(timedelta(seconds=MARGIN_S))
        # The store may never answer (a stopped process closes nothing), so a thread that nobody
        # waits for talks to it, and another keeps the time.
        threading.Thread(target=self._talk, name="stall-talk", daemon=True).start()
        self._clock = threading.Thread(target=self._run, name="stall", daemon=True)
        self._clock.start()

    def doing(self, what: str) -> None:
        """What this rank does from now on, in a word or two; the time starts anew."""
        self._doing = what
        self._restart()

    def finished(self, step: int) -> None:
        """A step is done; the time starts anew."""
        self._finished = step
        self._restart()

    def close(self) -> None:
        self._closed.set()
        self._clock.join()

    def _restart(self) -> None:
        self._since = time.monotonic()
        self.report = None
        self._asks.clear()

    def _talk(self) -> None:
        for beat in itertools.count():
            try:
                status = Status(beat, self._finished, self._doing)
                self._store.set(_key(self._rank), json.dumps(status))
                if self._asks.is_set():
                    self._heard.append([self._told_by(rank) for rank in range(self._size)])
            except RuntimeError:  # the process that holds the store has ended
                return
            if self._closed.wait(BEAT_S):
                return

    def _told_by(self, rank: int) -> Status | None:
        key = _key(rank)
        return Status(*json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _run(self) -> None:
        while not self._closed.wait(BEAT_S):
            since = self._since
            late_s = time.monotonic() - since - self._timeout_s
            if late_s > 0 and self.report is None:
                report = self._ask()
                if self._since != since:  # it went on while all were asked
                    continue
                self.report = report
                log.critical("%s", report)
            if late_s > 4 * MARGIN_S:
                for handler in logging.getLogger().handlers:
                    handler.flush()
                os._exit(InfraError.exit_code)

    def _ask(self) -> str:
        """Which rank has finished which step, and what it does."""
        why = f"nothing was finished for {self._timeout_s:.0f} s"
        self._heard.clear()
        self._asks.set()
        until = time.monotonic() + 2 * MARGIN_S
        while len(self._heard) < 3 and time.monotonic() < until:  # some beats apart
            time.sleep(BEAT_S / 4)
        if len(self._heard) < 3:
            own = _state(None, Status(0, self._finished, self._doing))
            return f"{why}: rank 0 does not answer for all; rank {self._rank} {own}"
        ranks_in: dict[str, list[int]] = {}
        for rank, statuses in enumerate(zip(self._heard[0], self._heard[2], strict=True)):
            ranks_in.setdefault(_state(*statuses), []).append(rank)
        shown = [
            f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks))} {state}"
            for state, ranks in ranks_in.items()
        ]
        return f"{why}: {'; '.join(shown)}"


@contextmanager
def detected(timeout_s: float, finished: int) -> Iterator[Rank]:
    """Detect a stall of this group inside the block, from the step `finished` on.

    timeout_s: the longest that a rank may do one thing, see `Rank.doing`.

    Needs a process group. What is raised inside, once a report was made, becomes an InfraError of
    that report. Raises PeerLost where the connection to another rank breaks.
    """
    # Private: torch's public functions take a timeout only when they make a group.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s + 2 * MARGIN_S))
    rank = Rank(timeout_s, finished)
    try:
        yield rank
    except Exception as error:
        rank.close()  # where a collective timed out, the report is just being made
        if rank.report is not None:
            fix = "Look at that process and its machine; the same command resumes"
            raise InfraError("workers", rank.report, fix) from error
        if _of_connection(error):
            why, fix = "the connection to another worker broke", "The same command resumes"
            raise PeerLost("workers", why, fix) from error
        raise
    finally:
        rank.close()


def _of_connection(error: Exception) -> bool:
    """Whether it comes from the process group. What gloo raises has no class of its own."""
    gloo = type(error) is RuntimeError and "gloo" in str(error)
    return gloo or isinstance(error, dist.DistError)


def _state(before: Status | None, after: Status | None) -> str:
    if after is None:
        return "has not begun"
    silent = before is not None and before.beats == after.beats
    state = "gives no sign of life" if silent else after.doing
    return f"last finished step {after.finished}, {state}"


def _key(rank: int) -> str:
    return f"stall/{rank}"
