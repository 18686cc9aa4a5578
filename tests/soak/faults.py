"""What happens to a run in a soak: each kind of fault, and a schedule of them drawn from a seed.

A fault is a context: it happens when the context is entered, which gives the time (seconds since
the epoch), and what is broken for a while is repaired when it is left.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from random import Random
from typing import Any, NamedTuple

from tests.infra import faulty
from tests.soak.world import Operator, World

SHARE = 0.3  # of the requests that a disturbed store disturbs
LASTS = 12  # steps that a thing stays broken, at most

Fault = Callable[[World, Operator, Random], AbstractContextManager[float]]


@contextmanager
def a_rank_dies(world: World, operator: Operator, rng: Random) -> Iterator[float]:
    os.kill(rng.choice(operator.workers()), signal.SIGKILL)
    yield time.time()


@contextmanager
def the_driver_dies(world: World, operator: Operator, rng: Random) -> Iterator[float]:
    operator.run.process.kill()
    yield time.time()


@contextmanager
def a_node_dies(world: World, operator: Operator, rng: Random) -> Iterator[float]:
    """Another joins a moment later."""
    lost = False
    while not lost:
        with suppress(LookupError):  # a process of a node that was lost before
            world.nodes.lose(rng.choice(operator.workers()))
            lost = True
    when = time.time()
    time.sleep(rng.uniform(0, 5))
    world.nodes.add()
    yield when


@contextmanager
def all_nodes_die(world: World, operator: Operator, rng: Random) -> Iterator[float]:
    """As in a power cut: the head and the driver, too."""
    operator.run.process.kill()
    when = time.time()
    world.nodes.lose_all()
    yield when


@contextmanager
def the_driver_gets_notice(world: World, operator: Operator, rng: Random) -> Iterator[float]:
    operator.run.process.terminate()
    yield time.time()


@contextmanager
def the_mlflow_server_dies(world: World, operator: Operator, rng: Random) -> Iterator[float]:
    world.server.down()
    yield time.time()
    world.server.database.up()
    world.server.down()  # where the repair of another fault has started it meanwhile
    world.server.start()  # the run does not wait for it


@contextmanager
def the_database_dies(world: World, operator: Operator, rng: Random) -> Iterator[float]:
    world.server.database.kill()
    yield time.time()
    world.server.database.up()


@contextmanager
def the_disk_is_full(world: World, operator: Operator, rng: Random) -> Iterator[float]:
    filler = world.disk / f"filler-{rng.random()}"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield time.time()
    filler.unlink()


def the_store(fault: faulty.Fault) -> Fault:
    """A share of all requests meets a fault."""

    @contextmanager
    def disturbed(world: World, operator: Operator, rng: Random) -> Iterator[float]:
        chance = Random(rng.random())  # of threads of the server, which must not change `rng`

        def sometimes(store: Any, environ: Any, start_response: Any) -> Iterable[bytes]:
            if chance.random() < SHARE:
                return fault(store, environ, start_response)
            answer: Iterable[bytes] = store(environ, start_response)
            return answer

        rule = world.store.fail(sometimes)
        yield time.time()
        rule.left = 0

    return disturbed


FAULTS: dict[str, Fault] = {
    "a rank dies": a_rank_dies,
    "the driver dies": the_driver_dies,
    "a node dies": a_node_dies,
    "all nodes die": all_nodes_die,
    "the driver gets notice": the_driver_gets_notice,
    "the MLflow server dies": the_mlflow_server_dies,
    "the database dies": the_database_dies,
    "the disk is full": the_disk_is_full,
    "the store is slow": the_store(faulty.FAULTS["slow"]),
    "the store refuses": the_store(faulty.FAULTS["503"]),
    "requests are cut": the_store(faulty.FAULTS["cut request"]),
    "answers are cut": the_store(faulty.FAULTS["cut answer"]),
}


class Planned(NamedTuple):
    """A fault that happens after one step and, if it lasts, is repaired after another."""

    step: int
    repaired: int
    name: str


def drawn(seed: int, count: int, steps: int) -> list[Planned]:
    """A schedule, in which all kinds come equally often, as far as their number allows."""
    rng = Random(seed)
    rounds = -(-count // len(FAULTS))
    names = [name for _ in range(rounds) for name in rng.sample(sorted(FAULTS), len(FAULTS))]
    moments = sorted(rng.sample(range(2, steps - 2 * LASTS), count))
    return [
        Planned(step, step + rng.randint(2, LASTS), name)
        for step, name in zip(moments, names, strict=False)
    ]
