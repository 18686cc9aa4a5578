"""A thread beside the work of a process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(act: Callable[[], object], every_s: float, name: str) -> Iterator[None]:
    """Inside the block, a thread of this name calls `act` every `every_s` seconds, the first time
    after as many, until `act` returns True. The block ends when a call that is under way has ended;
    the process does not wait for one."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every_s) and act() is not True:
            pass

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
