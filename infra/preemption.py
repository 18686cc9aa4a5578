"""How a process learns that it is to end, or that its machine is about to be taken away.

SIGTERM, which a scheduler sends some time before it kills, reaches the process that started a run.
That process writes the file `stop` into the run directory, the one place that every worker can
read, whatever machine it is on; a worker finds it, makes a last checkpoint there, and ends. Ray
announces separately that it drains a node: its worker makes a checkpoint early and goes on, with
the rows that have been read ahead, since a node that drains starts no new tasks.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import TYPE_CHECKING

from infra import console
from infra.errors import Problem
from infra.threads import repeated

if TYPE_CHECKING:  # fsspec, whose import `--help` is not to pay
    from infra.storage import Folder

ASK_S = 2.0  # between two looks of a worker
STOP = "stop"


class Terminated(KeyboardInterrupt):
    """SIGTERM has ended a run; the same command resumes it."""


# --- in the process that got SIGTERM -----------------------------------------------------------


@contextmanager
def terminable(first: Callable[[], None] | None = None) -> Iterator[None]:
    """Inside the block, SIGTERM raises Terminated.

    first: called on the first SIGTERM instead of that; it must return at once. Only the main
    thread of a process receives signals: in any other thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending = [first] if first else []
    raised = False

    def handle(*_: object) -> None:
        nonlocal raised
        if not pending:
            raised = True
            raise Terminated
        pending.pop()()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except KeyboardInterrupt as error:
        # While it waits for results, Ray turns what a handler raises into a plain one.
        if raised and not isinstance(error, Terminated):
            raise Terminated from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM, which `ray.init` replaces by one that ends the process.

    Raises Terminated for a SIGTERM that comes before `ray.init` returns.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM:
            raise Terminated from error
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def stoppable(run: Folder) -> Iterator[Callable[[], bool]]:
    """Inside the block, the first SIGTERM asks the workers of a run to stop, a second raises
    Terminated. Needs the sole right to write into the run directory. Yields a function that says,
    inside the block, whether SIGTERM has come."""
    asked, closed = threading.Event(), threading.Event()

    def write() -> None:  # in a thread, because a signal handler must not wait for a store
        asked.wait()
        while not closed.is_set():
            try:
                run.write_bytes(STOP, b"")
                console.say(
                    "SIGTERM: the workers end after a checkpoint; a second one ends at once"
                )
                return
            except Problem:  # the store does not answer; the last checkpoint needs it too
                closed.wait(ASK_S)

    run.remove(STOP)  # what an attempt left that was killed
    thread = threading.Thread(target=write, name="stop", daemon=True)
    thread.start()
    try:
        with terminable(asked.set):
            yield asked.is_set
    finally:
        closed.set()
        asked.set()
        thread.join()
        with suppress(Problem):  # the next attempt removes it as well
            run.remove(STOP)


# --- in a worker -------------------------------------------------------------------------------


class Notice(IntEnum):
    """What a worker was told. Where workers were told different things, the highest counts."""

    NONE = 0
    SAVE = 1  # this machine is about to go: make a checkpoint now, then go on
    END = 2  # the run is to stop: make a last checkpoint, then end


@contextmanager
def notices(run: Folder | None) -> Iterator[Callable[[], Notice]]:
    """A function that tells the latest notice, inside the block.

    run: the one whose workers may be asked to stop; None: listen to this machine alone. A thread
    asks, since a store or a cluster may answer slowly.
    """
    latest = Notice.NONE

    def listen() -> bool:
        nonlocal latest
        if run is not None and stop_requested(run):
            latest = Notice.END
        elif latest is Notice.NONE and node_is_leaving():
            latest = Notice.SAVE
        return latest is Notice.END

    with repeated(listen, ASK_S, "notices"):
        yield lambda: latest


def stop_requested(run: Folder) -> bool:
    """Whether the workers of a run have been asked to stop; False where its store is away."""
    try:
        return run.exists(STOP)
    except Problem:
        return False


def node_is_leaving() -> bool:
    """Whether Ray is draining the node of this process: a preemption was announced, or the
    node's pod got SIGTERM. Always False outside of Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    # Private: the public `ray.train.get_preemption_info` is a barrier of all workers, and
    # `ray.nodes` does not tell draining nodes from others.
    ask = ray._private.state.state.get_draining_nodes
    try:
        draining = ask()
    except Exception:  # the head of the cluster does not answer at the moment
        return False
    return ray.get_runtime_context().get_node_id() in draining
