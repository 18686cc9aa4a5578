"""A sweep of trials so small that four of them and a kill fit into a minute.

    python -m tests.pipelines.sweeping.small root=… data=…

runs it as its own command line would.
"""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from pathlib import Path

from infra import config
from infra.errors import InfraError
from pipelines import sweep
from pipelines.sweeping.settings import TRIALS, SweepConfig
from pipelines.sweeping.trials import BOUND, PARTS, State, Trial, Trials, Validation
from tests.pipelines import tiny

COMMON = [*tiny.SIZE, *(s for s in tiny.TRAIN if s.startswith(("train.", "workers.")))]
SPACE = "{converter.beta: {kind: choice, values: [0.3, 1.0, 3.0]}}"
SETTINGS = [
    "name=tried",
    "finetune.init=scratch",
    "finetune.converter={embed_dim: 8, mask_prior: 0.5}",
    *(f"finetune.{setting}" for setting in COMMON),
    "search.kind=grid",
]


def load(*argv: str, space: str = SPACE) -> SweepConfig:
    """The configuration, small where `argv` does not say otherwise."""
    given = ["data=shards", *SETTINGS, f"space={space}", *argv]
    return config.load(SweepConfig, verb="sweep", argv=given, presets=tiny.PRESETS)


def trial(
    number: int, settings: dict[str, object], state: State = "finished", *bounds: float
) -> Trial:
    """One that reported a bound every 10 steps."""
    validations = [Validation(10 * n, b, b + 0.1, b - 0.1) for n, b in enumerate(bounds, 1)]
    return Trial(
        name=f"trial-{number:03d}",
        settings=settings,
        state=state,
        why="" if state == "finished" else "because",
        validations=tuple(validations),
    )


def write(run: Path, *bounds: float) -> None:
    """A journal with a bound every 10 steps."""
    from infra.journal import Journal

    run.mkdir(parents=True, exist_ok=True)
    journal = Journal(str(run))
    for number, bound in enumerate(bounds, 1):
        journal.append(10 * number, {BOUND: bound, PARTS[0]: bound + 0.1, PARTS[1]: bound - 0.1})
    journal.close()


def one_by_one(config: SweepConfig, parent: str | None, most: float = math.inf) -> None:
    """The trials in this process, in the place of Ray Tune, interrupted after so many of them.

    `tuning._start` must be replaced, too: `lambda workers: worker.train`.
    """
    from pipelines.sweeping import tuning

    proposals = tuning.Proposals(config, Trials(folder=config.folder / TRIALS))
    while isinstance(chosen := proposals.suggest(""), dict):
        if most < 1:
            raise KeyboardInterrupt
        with suppress(InfraError):  # it is lost
            tuning._trial(chosen, config, parent)
        most -= 1


if __name__ == "__main__":
    sys.argv = ["sweep", *SETTINGS, *sys.argv[1:]]
    sys.exit(sweep.main())
