"""A Ray cluster on this machine that lives as long as the process that starts it."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

from infra.errors import InfraError
from infra.preemption import sigterm_kept

OBJECT_STORE_BYTES = 256 * 2**20
WHERE = "Ray on this machine"


def require_token() -> None:
    """Let a cluster started later ask for a token that only this process and its children know.

    Ray turns tokens on for local clusters and would write one into the home folder. Call this
    before the first `import ray`, which may already read the environment.
    """
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextmanager
def started(num_cpus: int) -> Iterator[None]:
    """A Ray cluster of `num_cpus` logical CPUs, to which this process is connected in the block.

    Raises InfraError if this machine is too busy to start one. If its raylet dies later, this
    process prints an InfraError and ends with its exit code.
    """
    import ray

    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # never preempted
    # Ray's default of 15 leaves a worker nearly nothing of a core that other work wants, too.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        with _its_address_known(), _in_its_own_session(), sigterm_kept():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=True,  # without it Ray Train logs a complaint every second
                logging_level="error",
            )
    except Exception as error:
        # Of Ray's processes that are not up in time. Any other is a bug.
        if type(error) is not Exception and not str(error).startswith("Failed to start GCS"):
            raise
        why = str(error).partition("\n")[0]
        fix = "See that the machine has time and memory left"
        raise InfraError(WHERE, why, f"{fix}, then run it again") from error
    try:
        with _raylet_watched():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _its_address_known() -> Iterator[None]:
    """Tell the processes of the cluster that is started in the block its address.

    Ray Train checks on its controller through any Ray it finds. With several on a machine that may
    be another one, which has no such controller, and a healthy run would lose its workers.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    own = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"127.0.0.1:{port}"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _in_its_own_session() -> Iterator[None]:
    """Start the processes of Ray outside the process group of this process.

    `timeout`, for one, sends SIGTERM to the whole group of a command. Ray's processes would end at
    once, and the workers could not make their last checkpoint. When this process dies, the kernel
    of Linux still ends them. Elsewhere Ray relies on the process group, so there it is left alone.
    """
    if sys.platform != "linux":
        yield
        return
    # Private: `ray.init` has no argument for it.
    from ray._private import services

    before = services.ConsolePopen
    services.ConsolePopen = partial(before, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = before


@contextmanager
def _raylet_watched() -> Iterator[None]:
    """End this process with a message if the raylet dies in the block, killed for memory say.

    Otherwise Ray waits for ever, or ends this process with exit code 1 and no message. The latter
    still happens where the raylet gets SIGTERM, if Ray hears of it first.
    """
    # Private: Ray names its sockets to nobody. The one of the object store is the first to close.
    from ray._private.worker import _global_node

    store = socket.socket(socket.AF_UNIX)
    store.connect(_global_node.plasma_store_socket_name)
    over = threading.Event()

    def watch() -> None:
        with store, suppress(OSError):
            store.recv(1)  # the store says nothing: this returns when the connection ends
        if not over.is_set():
            fix = "Out of memory? Run the same command again to resume"
            error = InfraError(WHERE, "its raylet has died", fix)
            sys.stderr.write(f"{error}\n")
            sys.stderr.flush()
            os._exit(error.exit_code)

    threading.Thread(target=watch, name="raylet", daemon=True).start()
    try:
        yield
    finally:
        over.set()
