"""Ray: connecting to a cluster, running a function on its workers, knowing the commit.

`python -m infra.cluster up|submit|logs|down` is the command line of `infra.head`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from infra.errors import ConfigError, DataError, InfraError, Problem, causes

ROOT = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 256 * 2**20
DATA_CPUS = 2  # Ray Data's tasks need CPUs of their own beside the training workers
START_ATTEMPTS = 10  # of a minute each: the time an autoscaler has to bring machines
COMMIT_VARIABLE = "SUBMITTED_COMMIT"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise each line of a worker appears twice
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a worker and in the driver
}


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which Ray to use: that at `address`, else that of this process's job, else a local one."""

    address: str | None = None
    num_cpus: int | None = None  # of a local cluster; default: the machine's, or more if needed


class Revision(NamedTuple):
    """The commit of the code that runs, and whether files differ from it."""

    sha: str
    dirty: bool

    def __str__(self) -> str:
        return self.sha + ("-dirty" if self.dirty else "")


@contextmanager
def connected(config: ClusterConfig, *, needed_cpus: int = 1) -> Iterator[None]:
    """Connect to Ray for the duration of the block, unless this process is connected already.

    A local cluster has logical CPUs for `needed_cpus` and for the data tasks beside them. It
    requires a token that only this process and its children know, so that Ray writes none into the
    home folder. Raises InfraError if there is no cluster at the address.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not address and not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        # Ray turns tokens on for local clusters. It may already have read RAY_AUTH_MODE.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        yield
        return
    if address:
        try:
            with _sigterm_kept():
                ray.init(address=address, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            why = str(error).splitlines()[0]
            raise InfraError(f"Ray at {address}", why, "Is it up, and the token right?") from error
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # never preempted
        with _its_address_known(), _sigterm_kept():
            ray.init(
                address="local",
                num_cpus=config.num_cpus or max(os.cpu_count() or 1, needed_cpus + DATA_CPUS),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=True,  # without it Ray Train logs a complaint every second
                logging_level="error",
            )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces by one that ends the process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


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


def fit(
    worker: Callable[[dict[str, Any]], Any],
    payload: dict[str, Any],
    *,
    name: str,
    num_workers: int | tuple[int, int],
    resources_per_worker: dict[str, float] | None = None,
    use_gpu: bool = False,
    storage: str | None = None,
    max_failures: int = 0,
    resize_s: float = 60.0,
    callbacks: Sequence[Any] = (),
) -> Any:
    """Run `worker(payload)` on `num_workers` processes of one group and return rank 0's result.

    When a process dies or raises, the whole group starts again, up to `max_failures` times; the
    worker resumes from checkpoints of its own. A ConfigError or a DataError ends it at once: a
    second attempt would meet the same. Ray's bookkeeping gets a name and, unless `storage` names a
    folder, a temporary place per call, so it never resumes anything by itself.

    num_workers: or (least, most): a group that starts again with as many as there is room for when
    a node is lost, and, looking every `resize_s` seconds, when there is room for more.
    callbacks: Ray Train's.

    A worker's Problem is raised as it is; InfraError where the workers died or found no room.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    place = storage or tempfile.mkdtemp(prefix="ray-train-")
    trainer = TorchTrainer(
        worker,
        train_loop_config=payload,
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker=resources_per_worker,
            elastic_resize_monitor_interval_s=resize_s,
        ),
        run_config=RunConfig(
            name=f"{name}-{secrets.token_hex(4)}",
            storage_path=place,
            failure_config=FailureConfig(
                max_failures=max_failures, controller_failure_limit=START_ATTEMPTS
            ),
            logging_config=LoggingConfig(log_level="CRITICAL"),
            callbacks=[_last_words(), *callbacks],
        ),
    )
    try:
        with _interrupts():
            return trainer.fit().return_value
    except TrainingFailedError as error:
        found = list(causes(error))
        for cause in found:
            if isinstance(cause, Problem):
                raise cause from error
        if any(isinstance(cause, ray.exceptions.RayActorError) for cause in found):
            raise InfraError(
                name, f"a worker died, {max_failures} restarts allowed", "Out of memory?"
            ) from error
        raise
    finally:
        if not storage:
            shutil.rmtree(place, ignore_errors=True)


def _last_words() -> Any:
    """A callback of Ray Train that raises, in its controller, what no restart can mend."""
    from ray.train import UserCallback

    class LastWords(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            for error in worker_exceptions.values():
                for cause in causes(error):
                    if isinstance(cause, ConfigError | DataError):
                        raise cause

    return LastWords()


@contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C under Ray Train as KeyboardInterrupt: Train's own handler would exit with 0."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


# --- the commit ------------------------------------------------------------------------------


def job_id() -> str | None:
    """The id of the Ray job that this process belongs to; None outside of a job."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return job.get("metadata", {}).get("job_submission_id")


def commit(folder: Path = ROOT) -> Revision | None:
    """The commit of the code: the one submitted with the job, else git's of `folder`."""
    sha, _, dirty = os.environ.get(COMMIT_VARIABLE, "").partition("-")
    if sha:
        return Revision(sha, bool(dirty))

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return Revision(git("rev-parse", "HEAD"), bool(git("status", "--porcelain")))
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    from infra.head import main

    sys.exit(main())
