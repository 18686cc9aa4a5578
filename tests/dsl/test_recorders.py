"""What recorders report of steps whose answer is known by hand (004 figure 2).

Shapes: B rows, L positions, T steps, V tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsl import chunks
from dsl.likelihood import log_prob_of
from dsl.noise import Draws
from dsl.paths import Clock
from dsl.posterior import Posterior
from dsl.recorders import Rewrites, Schedule, Sharpening, Trajectory, max_prob, nucleus_size
from dsl.sampling import Recorder, sample
from dsl.state import State
from tests.dsl.laws import Written, random_law

LAW = random_law(tokens=3, length=4, dim=2, seed=3)
DENOISER = LAW.denoiser()
CLOCK = Clock(call=0, budget=1, draws=Draws(0, 0, 0))
INF = math.inf


def state(gamma: Sequence[float], tokens: Sequence[int], frozen: int = 0) -> State:
    """One row; the first ``frozen`` positions are frozen."""
    gamma_BL = torch.tensor([gamma], dtype=torch.float64)
    return State(
        tokens_BL=torch.tensor([tokens]),
        z_BLD=torch.zeros(1, len(gamma), 2, dtype=torch.float64),
        gamma_BL=gamma_BL,
        frozen_BL=torch.arange(len(gamma))[None] < frozen,
    )


def written(at: State) -> Written:
    return Written(at, torch.eye(4, dtype=torch.float64), PROBS.log())


def watch(recorder: Recorder, states: Sequence[State]) -> None:
    for before, after in itertools.pairwise(states):
        recorder.observe(CLOCK, before, written(before), after)


def test_schedule_by_hand() -> None:
    recorder = Schedule()
    watch(
        recorder,
        [
            state([INF, 0, 0, 0, 0], [1, 0, 0, 0, 0], frozen=1),
            state([INF, 0, 2, INF, INF], [1, 0, 0, 2, 1], frozen=1),
            state([INF, INF, 2, 0, INF], [1, 1, 0, 0, 1], frozen=1),
            state([INF] * 5, [1] * 5, frozen=1),
        ],
    )
    assert recorder.result() == {
        "masked": [0.25, 0.25, 0.0],
        "evidence": [0.25, 0.25, 0.0],
        "revealed": [0.5, 0.5, 1.0],
        "reveals": [0.5, 0.25, 0.5],
    }


def test_rewrites_by_hand() -> None:
    """A given wrong token counts as rewritten when it comes back otherwise, a token that comes
    back the same does not, and what happens in between is forgotten only when revealed anew."""
    recorder = Rewrites()
    watch(
        recorder,
        [
            state([INF, INF, INF, 0, 0], [2, 1, 2, 0, 0], frozen=1),  # 1 and 2 are given
            state([INF, 0, 0, INF, 0], [2, 0, 0, 1, 0], frozen=1),  # both are taken back
            state([INF, 3, INF, INF, 0], [2, 0, 2, 1, 0], frozen=1),  # one comes back the same
            state([INF, INF, INF, 1, INF], [2, 0, 2, 0, 0], frozen=1),  # one as 0: rewritten
            state([INF, INF, INF, INF, INF], [2, 0, 2, 2, 0], frozen=1),  # 1 became 2: rewritten
        ],
    )
    assert recorder.result() == {
        "remasked": [1.0, 0.0, 0.5, 0.0],
        "rewritten": [0.0, 0.0, 0.25, 0.25],
        "rewrites_per_token": 0.5,
    }


def test_nothing_editable_is_no_division_by_zero() -> None:
    finished = state([INF, INF], [1, 2], frozen=2)
    for recorder in (Schedule(), Rewrites()):
        watch(recorder, [finished, finished])
    assert Rewrites().result()["rewrites_per_token"] == 0


PROBS = torch.tensor(
    [
        [0.5, 0.25, 0.125, 0.125],
        [0.0, 0.0, 1.0, 0.0],
        [0.25, 0.25, 0.25, 0.25],
        [0.125, 0.625, 0.25, 0.0],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize(
    ("p", "sizes"),
    [(0.5, [1, 1, 2, 1]), (0.75, [2, 1, 3, 2]), (0.76, [3, 1, 4, 2]), (1.0, [4, 1, 4, 3])],
)
def test_nucleus_is_the_fewest_tokens_that_reach_p(p: float, sizes: list[int]) -> None:
    assert nucleus_size(PROBS.log(), p).tolist() == sizes


def test_nucleus_never_exceeds_the_vocabulary() -> None:
    log_probs_NV = torch.randn(50, 7).log_softmax(-1)  # float32 sums may miss 1
    assert (nucleus_size(log_probs_NV, 1.0) <= 7).all()


def test_sharpening_by_hand() -> None:
    recorder = Sharpening(top_p=0.75)
    before = state([0, INF, 2, 0], [0, 3, 0, 0])
    done = state([INF] * 4, [0] * 4)
    recorder.observe(CLOCK, before, written(before), done)
    recorder.observe(CLOCK, done, written(done), done)
    seen = recorder.result()
    unrevealed = PROBS[[0, 2, 3]]
    assert seen["max_prob"][0] == pytest.approx((0.5 + 0.25 + 0.625) / 3)
    assert seen["nucleus_size"][0] == pytest.approx((2 + 3 + 2) / 3)
    entropy = torch.special.entr(unrevealed).sum(1).mean().item()
    assert seen["entropy"][0] == pytest.approx(entropy)
    assert [len(values) for values in seen.values()] == [2, 2, 2]
    assert all(math.isnan(values[1]) for values in seen.values())
    for top_p in (0.0, 1.1):
        with pytest.raises(ValueError, match="top_p"):
            Sharpening(top_p=top_p)


def test_summaries_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = written(state([0] * 4, [0] * 4))
    at_N, tokens_N = torch.tensor([3, 1, 0, 2, 1]), torch.tensor([1, 2, 0, 3, 2])
    assert posterior.summarise(max_prob, at_N).tolist() == pytest.approx([0.625, 1, 0.5, 0.25, 1])
    expected = posterior.summarise(log_prob_of, at_N, tokens_N)
    assert expected.exp().tolist() == pytest.approx([0.625, 1, 0.5, 0.25, 1])
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 8)  # two positions a chunk
    assert torch.equal(posterior.summarise(log_prob_of, at_N, tokens_N), expected)
    assert posterior.summarise(max_prob, at_N[:0]).shape == (0,)


@dataclass(frozen=True)
class Reopen:
    """Reveals everything at every even call and masks everything at every odd one."""

    def init(self, at: State) -> None:
        return None

    def target(
        self, at: State, posterior: Posterior, carry: None, clock: Clock
    ) -> tuple[Tensor, None]:
        return torch.full_like(at.gamma_BL, 0.0 if clock.call % 2 else INF), None


def test_recorders_of_a_sample() -> None:
    """Together, through `dsl.sample`: shapes, sums, and the same text as without them."""
    rows, budget = 50, 7
    start = State.masked(rows, 4, 2)
    recorders = [Schedule(), Rewrites(), Sharpening(), Trajectory()]
    made = sample(DENOISER, Reopen(), start, budget=budget, seed=0, recorders=recorders)
    plain = sample(DENOISER, Reopen(), start, budget=budget, seed=0)
    assert torch.equal(made.tokens_BL, plain.tokens_BL)
    seen = made.recorded
    assert set(seen) == {"schedule", "rewrites", "sharpening", "trajectory"}
    assert seen["schedule"]["revealed"] == [1.0, 0.0] * 3 + [1.0]
    assert seen["rewrites"]["remasked"] == [0.0, 1.0] * 3 + [0.0]

    tokens_TBL = seen["trajectory"]["tokens_TBL"]
    assert tokens_TBL.shape == seen["trajectory"]["gamma_TBL"].shape == (budget + 1, rows, 4)
    drafts = tokens_TBL[1::2]
    rewritten = (drafts[1:] != drafts[:-1]).double().mean((1, 2)).sum().item()
    assert seen["rewrites"]["rewrites_per_token"] == pytest.approx(rewritten)
    assert rewritten > 0.5
    assert torch.equal(tokens_TBL[-1], made.tokens_BL)

    # Every even call finds all masked: the prior. Every odd one finds nothing to be unsure of.
    prior = DENOISER(State.masked(1, 4, 2)).log_probs()[0]
    expected = prior.exp().amax(1).mean().item()
    assert seen["sharpening"]["max_prob"][::2] == pytest.approx([expected] * 4)
    assert all(math.isnan(value) for value in seen["sharpening"]["max_prob"][1::2])
