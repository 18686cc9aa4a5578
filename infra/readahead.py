"""The rows of `infra.mixture`, read ahead by Ray Data on the node of each training worker."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice
from typing import TypeVar

import numpy as np

from infra.errors import Problem
from infra.mixture import Mixture, microbatches
from infra.stream import Pieces, Plan, Window, read_window

WINDOWS_PER_HORIZON = 128  # of one Ray Data execution, in an endless stream of them
STEPS_AHEAD = 64
READERS = 2  # tasks at a time, for one worker and one source
END_S = 10.0  # for a thread to end what it does with Ray
PAUSE_S = 0.05  # of Ray Data's scheduling thread, between two looks at its tasks

T = TypeVar("T")


def ray_batches(
    order: Mixture, lanes: Sequence[int], start_step: int = 0
) -> Iterator[dict[int, np.ndarray]]:
    """The same as `mixture.read`, read ahead by Ray Data tasks on this worker's node."""
    return microbatches(order, lanes, start_step, _pieces_by_ray)


def _pieces_by_ray(plan: Plan, lanes: Sequence[int], steps: Sequence[int]) -> Pieces:
    windows = plan.windows(lanes, steps)
    horizons = iter(lambda: list(islice(windows, WINDOWS_PER_HORIZON)), [])
    rows = (piece for horizon in horizons for piece in _through_ray(plan, horizon))
    # Enough must be ready to last through the start of the next horizon, about a second.
    windows_ahead = STEPS_AHEAD * plan.config.rows_per_microbatch * plan.num_windows // plan.rows
    return _ahead(rows, len(lanes) * max(2, windows_ahead))


def _through_ray(plan: Plan, horizon: list[tuple[int, Window]]) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of some windows, one Ray Data task each.

    A task that meets a Problem returns nothing, and its window is read again here: if that fails
    too, the Problem is raised without a remote traceback around it.
    """
    import pyarrow as pa
    import ray.data

    # Private: what the public `custom_execution_callback_classes` holds.
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pause(ExecutionCallback):
        """While training is slower than reading, Ray's scheduling thread never waits. It would use
        a core, and Python's lock, for as long as there are windows left to read."""

        def on_execution_step(self, executor: object) -> None:
            time.sleep(PAUSE_S)

    folder, manifest = plan.folder, replace(plan.manifest, splits={})  # tasks need no file list

    def fetch(batch: dict[str, np.ndarray]) -> pa.Table:
        (nth,) = batch["nth"]
        try:
            rows_NL, _ = read_window(folder, manifest, horizon[nth][1])
        except Problem:
            rows_NL = np.empty((0, manifest.length), manifest.dtype)
        ids = pa.array(rows_NL.reshape(-1))
        lists = pa.FixedSizeListArray.from_arrays(ids, manifest.length)
        return pa.table({"nth": np.full(len(rows_NL), nth), "tokens": lists})

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # otherwise notices at every horizon
    dataset = ray.data.from_items(
        [{"nth": nth} for nth in range(len(horizon))], override_num_blocks=len(horizon)
    ).map_batches(
        fetch,
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.TaskPoolStrategy(size=READERS),
        num_cpus=0,  # the workers may have reserved every core, for which reading must not wait
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.context.custom_execution_callback_classes.append(Pause)

    due = 0
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        nth_N = block["nth"].to_numpy()
        rows_NL = block["tokens"].combine_chunks().flatten().to_numpy()
        rows_NL = rows_NL.reshape(-1, manifest.length)
        for nth in np.unique(nth_N):
            yield from _again(plan, horizon[due:nth])
            yield horizon[nth][0], rows_NL[nth_N == nth]
            due = nth + 1
    yield from _again(plan, horizon[due:])


def _again(plan: Plan, missed: Sequence[tuple[int, Window]]) -> Iterator[tuple[int, np.ndarray]]:
    for lane, window in missed:
        yield lane, plan.read(window)


def _ahead(items: Generator[T, None, None], depth: int) -> Iterator[T]:
    """The same endless items, drawn ahead by a thread that keeps up to `depth` of them ready.

    When this is closed, the thread ends first: Ray ends a process that leaves it while a thread
    still asks it for something.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    done = threading.Event()

    def draw() -> None:
        try:
            with closing(items):
                for item in items:
                    ready.put((item, None))
                    if done.is_set():
                        return
        except BaseException as error:
            ready.put((None, error))

    thread = threading.Thread(target=draw, name="stream", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error:
                raise error
            yield item
    finally:
        done.set()
        with suppress(queue.Empty):  # make room, so that a waiting thread sees that it is done
            ready.get_nowait()
        thread.join(END_S)
