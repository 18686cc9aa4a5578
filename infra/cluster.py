"""Ray: connecting to a cluster, running a function on its workers, knowing the commit.

`python -m infra.cluster up|submit|logs|down` is the command line of `infra.head`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from infra import console, local
from infra.errors import ConfigError, DataError, InfraError, PeerLost, Problem, causes
from infra.preemption import sigterm_kept

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
DATA_CPUS = 2  # Ray Data's tasks need CPUs of their own beside the training workers
START_S = 600.0  # the longest wait for workers: the time an autoscaler has to bring machines
SAY_S = 30.0  # between two lines about that wait
# The states of Ray Train's controller in which no worker runs yet, or none any more.
STARTING = ("InitializingState", "SchedulingState", "ReschedulingState", "RestartingState")
COMMIT_VARIABLE = "SUBMITTED_COMMIT"  # of the code that came with a job
COMMIT_FILE = "COMMIT"  # beside code that an image holds without its .git
# With one of these git works on another repository than that of the folder it is in.
OF_A_REPOSITORY = ("GIT_DIR", "GIT_COMMON_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
LOCAL = "local"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise each line of a worker appears twice
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a worker and in the driver
}


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which Ray to use: that at `address`, else that of this process's job, else a local one.
    The address `local` is that of a local one in any case."""

    address: str | None = None
    num_cpus: int | None = None  # of a local cluster; default: the machine's, or more if needed

    def __post_init__(self) -> None:
        if self.num_cpus is not None and self.num_cpus < 1:
            raise ValueError(f"num_cpus must be at least 1, got {self.num_cpus}")


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
    home folder. What workers write appears as `console.relay` shows it. Raises InfraError if there
    is no cluster at the address, or if this machine is too busy to start one.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    address = config.address or os.environ.get("RAY_ADDRESS") or LOCAL
    if address == LOCAL:
        local.require_token()
    import ray

    if ray.is_initialized():
        yield
        return
    num_cpus = config.num_cpus or max(os.cpu_count() or 1, needed_cpus + DATA_CPUS)
    with local.started(num_cpus) if address == LOCAL else _joined(address):
        _relayed()
        yield


@contextmanager
def _joined(address: str) -> Iterator[None]:
    """Connect to the cluster at the address for the duration of the block."""
    import ray

    try:
        with sigterm_kept():
            ray.init(address=address, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        why = str(error).splitlines()[0]
        raise InfraError(f"Ray at {address}", why, "Is it up, and the token right?") from error
    try:
        yield
    finally:
        ray.shutdown()


def _relayed() -> None:
    """Show the lines of workers ourselves: Ray would put a process id before each."""
    # Private: in public, Ray's lines can only be shown as they are or not at all.
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as streams

    name = "ray_print_logs"  # by which `ray.shutdown` removes it
    streams.remove_handler(name)
    streams.add_handler(name, console.relay)


def run_group(
    worker: Callable[[T], Any],
    payload: T,
    *,
    name: str,
    num_workers: int | tuple[int, int],
    resources_per_worker: dict[str, float] | None = None,
    use_gpu: bool = False,
    max_failures: int = 0,
    resize_s: float = 60.0,
    fatal: tuple[type[Exception], ...] = (),
    callbacks: Sequence[Any] = (),
) -> Any:
    """Run `worker(payload)` in each process of one group under Ray Train; rank 0's result.

    When a process dies or raises, the whole group starts again, up to `max_failures` times
    (-1: without limit); the worker resumes from checkpoints of its own. A ConfigError, a DataError
    or one of `fatal` ends it at once, because a second attempt would fail in the same way. Ray
    keeps its own records in a temporary folder, so it never resumes anything by itself.

    Args:
        num_workers: a number, or (least, most). With a range, the group goes on with as many
            workers as there is room for when a node is lost, and looks every `resize_s` seconds
            whether there is room for more.
        callbacks: of Ray Train.

    Raises:
        Problem: what a worker raised.
        InfraError: workers died too often, or there was no room for the least number of them
            within `START_S` seconds.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    place = tempfile.mkdtemp(prefix="ray-train-")
    resources = resources_per_worker or {"CPU": 1.0}
    least = num_workers if isinstance(num_workers, int) else num_workers[0]
    own = [_fatal_errors((ConfigError, DataError, *fatal)), _waiting(name, least, resources)]
    trainer = TorchTrainer(
        partial(worker, payload),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=resize_s,
        ),
        run_config=RunConfig(
            name=f"{name}-{secrets.token_hex(4)}",
            storage_path=place,
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=-1),
            logging_config=LoggingConfig(log_level="CRITICAL"),
            callbacks=[*own, *callbacks],
        ),
    )
    try:
        with _interrupts():
            return trainer.fit().return_value
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        problem = problem_of(error, name, max_failures)
        if problem is None:
            raise
        raise problem from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def problem_of(error: Exception, name: str, max_failures: int) -> Problem | None:
    """What an error of Ray Train tells the user; None for a bug.

    What a worker raised counts more than that one died, and that more than its loss for another.
    """
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError

    found = list(causes(error))
    problems = [cause for cause in found if isinstance(cause, Problem)]
    dead = [c for c in found if isinstance(c, RayActorError | OutOfMemoryError | NodeDiedError)]
    if dead:
        cause = str(dead[0]).partition("\n")[0].rstrip(".")
        restarts = "any number of" if max_failures < 0 else max_failures
        why = f"a worker died, {restarts} restarts allowed: {cause}"
        fix = "Out of memory, or did one stand still? See the lines above, and logs/ of the run"
        problems.append(InfraError(name, why, fix))
    return min(problems, key=lambda problem: isinstance(problem, PeerLost), default=None)


def _fatal_errors(kinds: tuple[type[Exception], ...]) -> Any:
    """A callback of Ray Train that ends training for errors of these kinds.

    What a callback raises in Train's controller is never retried.
    """
    from ray.train import UserCallback

    class FatalErrors(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            for error in worker_exceptions.values():
                for cause in causes(error):
                    if isinstance(cause, kinds):
                        raise cause

    return FatalErrors()


def _waiting(name: str, least: int, resources: dict[str, float]) -> Any:
    """A callback of Ray Train that says what the group waits for, and ends the wait in time.

    By itself, Ray waits for ever for the least number of an elastic group, and in silence.
    """
    # Private: the public UserCallback hears of nothing as long as no worker runs.
    from ray.train.v2._internal.execution.callback import ControllerCallback

    each = ", ".join(f"{value:g} {key}" for key, value in resources.items())
    what = f"{least} worker{'s' * (least > 1)} of {each}{' each' * (least > 1)}"
    limit_s, say_s = START_S, SAY_S  # as they are here: the controller is another process

    class Waiting(ControllerCallback):
        def __init__(self) -> None:
            self.since: float | None = None
            self.said = 0.0

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            if type(current_state).__name__ not in STARTING:
                self.since = None
                return
            now = time.monotonic()
            if self.since is None:
                self.since = self.said = now
            if now - self.since > limit_s:
                why = f"{what} could not be started within {limit_s:.0f} s"
                raise InfraError(name, why, "Ask for fewer or smaller ones, or add machines")
            if now - self.said > say_s:
                self.said, so_far = now, f"{now - self.since:.0f} s of {limit_s:.0f} s"
                console.say(f"{name}: waiting for {what}, {so_far}")

    return Waiting()


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
    """The commit of the code: the one submitted with the job, else what a file in `folder` says,
    else that of the repository that `folder` lies in, also in a git hook of another."""
    told = os.environ.get(COMMIT_VARIABLE, "")
    if not told:
        with suppress(FileNotFoundError):
            told = (folder / COMMIT_FILE).read_text().strip()
    sha, _, dirty = told.partition("-")
    if sha:
        return Revision(sha, bool(dirty))

    environment = {name: value for name, value in os.environ.items() if name not in OF_A_REPOSITORY}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    try:
        return Revision(git("rev-parse", "HEAD"), bool(git("status", "--porcelain")))
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    from infra.head import main

    sys.exit(main())
