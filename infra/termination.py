"""SIGTERM: the notice that a scheduler or a rented machine gives before it takes a process away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """A run was ended from outside, by SIGTERM; the same command goes on from what it left."""


@contextmanager
def noticed(first: Callable[[], None] | None = None) -> Iterator[None]:
    """SIGTERM raises Terminated inside the block; with `first`, from the second one on.

    first: what the first one does instead, in the main thread and soon. Other threads than the
    main one hear no signals, and there the block is only itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending = [first] if first else []

    def handle(*_: object) -> None:
        if not pending:
            raise Terminated
        pending.pop()()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
