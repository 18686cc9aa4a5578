"""The loop that walks a state along a path: the only one, whatever the path.

Shapes: B rows, L positions, V tokens, N asked positions, R rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dsl.channel import transition
from dsl.noise import Draws
from dsl.paths.clock import Clock, Path, Reports, Steers
from dsl.posterior import Denoises, Posterior
from dsl.state import State, flat, send


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Finished text, ids ``[B, L]``, and what it cost.

    ``calls`` counts denoiser evaluations of the batch. ``row_calls_B`` counts those that each row
    took part in: a row whose state has not changed is not evaluated again. ``recorded`` holds
    each recorder's result under its name, and what the path itself reports.
    """

    tokens_BL: Tensor
    calls: int
    row_calls_B: Tensor
    recorded: Mapping[str, Any]


class Recorder(Protocol):
    """Watches a sample being made. What it reads of the posterior may cost evaluations."""

    name: str

    def observe(self, clock: Clock, before: State, posterior: Posterior, after: State) -> None:
        """One step: the state, the posterior it was moved by, and the state it became."""

    def result(self) -> Any:
        """What was seen, once sampling is over."""


@torch.no_grad()
def sample(
    denoiser: Denoises,
    path: Path,
    state: State,
    *,
    budget: int,
    seed: int,
    first_row: int = 0,
    recorders: Sequence[Recorder] = (),
) -> Sample:
    """Draw text along a path in at most ``budget`` denoiser calls, the final reveal included.

    Randomness is keyed by (seed, row, step), rows counted from ``first_row``: a row's text does
    not depend on the rows beside it.

    Args:
        state: where to start: `State.masked`, or `State.from_tokens` for prompts and drafts.
        budget: denoiser calls, at least 1. After the last one every token is revealed.
        seed: a non-negative 64-bit integer.

    Raises:
        ValueError: the budget is no whole number from 1 on, the seed or the first row is out of
            range, or the state is of another number of dimensions than the denoiser's table.
        PathError: the path does not fit the budget or the length of the text.
    """
    if budget < 1 or budget % 1:
        raise ValueError(f"budget must be at least one call, and a whole number, got {budget}")
    state = state.like(denoiser.table_VD)
    carry = path.init(state)
    evaluator = _Evaluator(denoiser, state)
    call = 0
    while call < budget:
        evaluator.probes_left = budget - call - 1
        draws = Draws(seed, first_row, call)
        clock = Clock(call=call, budget=budget, draws=draws, evaluate=evaluator.probe)
        posterior = _Deferred(state, evaluator)
        gamma_next_BL, carry = path.target(state, posterior, carry, clock)
        call = budget - evaluator.probes_left
        if call == budget:
            gamma_next_BL = torch.full_like(state.host.gamma_BL, torch.inf)
        drift = path.steer(posterior, carry) if isinstance(path, Steers) else posterior
        after = transition(state, gamma_next_BL, drift, draws)
        # Before the evaluator moves on: a recorder may be the first to read this posterior.
        for recorder in recorders:
            recorder.observe(clock, state, posterior, after)
        evaluator.move(after)
        state = after
    return Sample(
        tokens_BL=state.tokens_BL,
        calls=evaluator.calls,
        row_calls_B=evaluator.row_calls_B,
        recorded={
            **(path.report(carry) if isinstance(path, Reports) else {}),
            **{recorder.name: recorder.result() for recorder in recorders},
        },
    )


class _Evaluator:
    """Calls the denoiser when an answer is wanted, and only for rows whose state has changed.

    A row that is revealed throughout needs no call: its posterior is one-hot.
    """

    def __init__(self, denoiser: Denoises, state: State) -> None:
        self.denoiser = denoiser
        self.state = state
        self.posterior: Posterior | None = None
        self.stale_B = torch.ones(len(state.gamma_BL), dtype=torch.bool)
        self.calls = 0
        self.probes_left = 0  # how many more calls this step of the loop may make
        self.row_calls_B = torch.zeros(len(state.gamma_BL), dtype=torch.int64)

    def move(self, state: State) -> None:
        # `transition` changes a token only with its gamma, so equal gammas mean an equal row.
        self.stale_B |= (state.host.gamma_BL != self.state.host.gamma_BL).any(1)
        self.state = state

    def answer(self) -> Posterior:
        wanted_B = self.stale_B & ~self.state.host.revealed_BL.all(1)
        if self.posterior is None:
            wanted_B = torch.ones_like(wanted_B)
        if self.posterior is None or wanted_B.all():
            self.posterior = self.denoiser(self.state)
        else:
            fresh, given_R = self.posterior, torch.arange(len(wanted_B))
            asked_R = self._batch(wanted_B)
            if len(asked_R):
                fresh, given_R = self.denoiser(self.state.rows(asked_R)), asked_R
            there_R = send(given_R, self.state.z_BLD.device)
            self.posterior = self.posterior.with_rows(self.state, there_R, fresh)
        self._count(wanted_B)
        self.stale_B &= ~wanted_B
        return self.posterior

    def _batch(self, wanted_B: Tensor) -> Tensor:
        """The rows to evaluate; on a GPU the first one is repeated until there are a power of two.

        A GPU plans its kernels anew for every size of batch, so sizes should be few. What it
        answers for a row does not depend on the rows beside it. No other row may fill up the batch:
        a finished one has to keep the answer from before its last reveal, which a path may still
        read.
        """
        rows_R = flat(wanted_B)
        if self.state.z_BLD.device.type == "cpu" or not len(rows_R):
            return rows_R
        size = min(1 << (len(rows_R) - 1).bit_length(), len(wanted_B))
        return torch.cat([rows_R, rows_R[:1].expand(size - len(rows_R))])

    def probe(self, state: State) -> Posterior:
        """The posterior of any other state, for one more call; the answer is not kept."""
        if self.probes_left == 0:
            raise ValueError("the path evaluates more states than its budget has calls left for")
        self.probes_left -= 1
        self._count(torch.ones_like(self.stale_B))  # finished rows are evaluated with the others
        return self.denoiser(state)

    def _count(self, wanted_B: Tensor) -> None:
        self.calls += bool(wanted_B.any())
        self.row_calls_B += wanted_B


class _Deferred(Posterior):
    """The posterior of one step of the loop, evaluated when it is first read."""

    def __init__(self, state: State, evaluator: _Evaluator) -> None:
        super().__init__(state, evaluator.denoiser.table_VD)
        self._evaluator = evaluator
        self._answer: Posterior | None = None
        self._mean_BLD: Tensor | None = None

    def _resolved(self) -> Posterior:
        if self._answer is None:
            self._answer = self._evaluator.answer()
        return self._answer

    def _log_probs_unrevealed(self, at_N: Tensor) -> Tensor:
        return self._resolved()._log_probs_unrevealed(at_N)

    def mean_at(self, at_N: Tensor) -> Tensor:
        if self._mean_BLD is not None:
            return self._mean_BLD.flatten(0, 1)[self._sent(at_N)]
        return self._resolved().mean_at(at_N)

    def mean(self) -> Tensor:
        # Kept: a path that reads x_hat does so just before `transition` moves by it.
        if self._mean_BLD is None:
            known = bool(self.state.host.revealed_BL.all())  # no denoiser need be asked
            self._mean_BLD = (
                self.table_VD[self.state.tokens_BL] if known else self._resolved().mean()
            )
        return self._mean_BLD

    def draw(self, at_N: Tensor, uniform_N: Tensor) -> Tensor:
        return self._resolved().draw(at_N, uniform_N)
