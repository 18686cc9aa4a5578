"""What a worker is told from outside while it works: its machine is going, or the run is to end."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

ASK_S = 2.0


class Notice(IntEnum):
    """The higher one prevails where the ranks have heard different ones."""

    NONE = 0
    SAVE = 1  # a machine is about to go: make a checkpoint now, then go on for as long as it lasts
    END = 2  # make a last checkpoint and come to an end


class Notices:
    """Asks in a thread of its own, for an answer may take a store or a cluster a while."""

    def __init__(
        self,
        *,
        ending: Callable[[], bool] = lambda: False,
        going: Callable[[], bool] = lambda: False,
    ) -> None:
        """ending, going: whether the run is to end, and whether this machine is about to go."""
        self.latest = Notice.NONE
        self._ending, self._going = ending, going

    @contextmanager
    def listening(self) -> Iterator[None]:
        closed = threading.Event()
        thread = threading.Thread(target=self._listen, args=[closed], name="notices", daemon=True)
        thread.start()
        try:
            yield
        finally:
            closed.set()
            thread.join()

    def _listen(self, closed: threading.Event) -> None:
        while not closed.wait(ASK_S):
            if self._ending():
                self.latest = Notice.END
                return
            if self.latest is Notice.NONE and self._going():
                self.latest = Notice.SAVE


def node_is_going() -> bool:
    """Whether Ray is draining the node of this process: it was announced that it will be taken,
    or the pod of its raylet got SIGTERM. Never outside of Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    try:
        # What Ray Train's own watcher asks; its public form is a barrier of all workers.
        going = ray._private.state.state.get_draining_nodes()
    except Exception:  # the head does not answer just now
        return False
    return ray.get_runtime_context().get_node_id() in going
