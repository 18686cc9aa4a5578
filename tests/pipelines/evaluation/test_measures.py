"""What is asked of models: invariant to batches, and right where there is a closed form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsl.likelihood import path_integral
from infra.shards import read_manifest
from pipelines.evaluation import held_out
from pipelines.evaluation.conditions import AtSNR, Revealed
from pipelines.evaluation.questions.converter import reading
from pipelines.evaluation.questions.likelihood import LikelihoodConfig, View, views
from pipelines.evaluation.questions.states import errors
from pipelines.kinds import DSL
from tests.pipelines import tiny
from tests.pipelines.evaluation.small import LENGTH, network, rows_of


@pytest.fixture(scope="module")
def tokens_NL(world: Path) -> Tensor:
    return torch.from_numpy(rows_of(world, 7))


ASKED = LikelihoodConfig(
    rows=7, samples=3, steps=3, gamma_max=9, gamma_star=(4, 9), contours=("diffusion", "staggered")
)


def nats(view: View, tokens_NL: Tensor, batch: int) -> np.ndarray:
    denoiser = network(28)
    firsts = range(0, len(tokens_NL), batch)
    parts = [view.measure(denoiser, tokens_NL[f : f + batch], first_row=f).mean_B for f in firsts]
    return torch.cat(parts).numpy()


@pytest.mark.parametrize("nth", range(5), ids=lambda n: views(DSL, ASKED, 0)[n].name)
def test_likelihoods_do_not_depend_on_batches(nth: int, tokens_NL: Tensor) -> None:
    view = views(DSL, ASKED, 1)[nth]
    whole = nats(view, tokens_NL, batch=7)
    assert nats(view, tokens_NL, batch=3) == pytest.approx(whole, rel=1e-5)
    reseeded = views(DSL, ASKED, 2)[nth]
    assert np.abs(nats(reseeded, tokens_NL, batch=7) - whole).min() > 1e-6


def test_errors_of_a_uniform_posterior_in_closed_form(tokens_NL: Tensor) -> None:
    denoiser = network(28, uniform=True)
    table_VD = denoiser.table_VD.detach()
    squared_NL = (table_VD[tokens_NL] - table_VD.mean(0)).square().sum(-1)
    found = errors(denoiser, tokens_NL, condition=AtSNR(snr=4.0), seed=0)
    assert found["nats"] == pytest.approx(np.full(7, math.log(28)), rel=1e-5)
    assert found["squared"] == pytest.approx(squared_NL.mean(1).numpy(), rel=1e-4)


def test_errors_agree_with_the_path_integral(tokens_NL: Tensor) -> None:
    denoiser = network(28)
    gammas = np.linspace(0.02, 1.98, 50)
    found = [
        errors(denoiser, tokens_NL, condition=AtSNR(snr=float(gamma)), seed=n)["squared"].mean()
        for n, gamma in enumerate(gammas)
    ]
    integral = path_integral(denoiser, tokens_NL, gamma_max=2.0, steps=50, seed=5, grid="linear")
    # Both are means over as many draws of the same noise.
    stderr = math.sqrt(2 * integral.stderr_B.square().sum().item()) / len(integral.mean_B)
    assert stderr < 0.05
    assert np.mean(found) == pytest.approx(integral.mean_B.mean().item(), abs=4 * stderr)


def test_a_share_of_the_tokens_is_revealed(tokens_NL: Tensor) -> None:
    class Watched:
        """Remembers the state that it is asked about."""

        def __init__(self) -> None:
            self.inner = network(28)
            self.table_VD = self.inner.table_VD

        def __call__(self, state: Any) -> Any:
            self.state = state
            return self.inner(state)

    denoiser: Any = Watched()
    quarter = Revealed(share=0.25)
    whole = errors(denoiser, tokens_NL, condition=quarter, seed=0)
    assert (denoiser.state.revealed_BL.sum(1) == LENGTH // 4).all()
    assert denoiser.state.masked_BL.sum(1).eq(LENGTH * 3 // 4).all()
    part = errors(denoiser, tokens_NL[2:], condition=quarter, seed=0, first_row=2)
    assert part["nats"] == pytest.approx(whole["nats"][2:], rel=1e-5)


def test_the_converter_is_read_where_the_error_is_measured(tokens_NL: Tensor) -> None:
    """From the mask prior to the token, and whatever the batches."""
    denoiser = network(28)
    of = {
        snr: reading(denoiser, tokens_NL, condition=AtSNR(snr=snr), seed=0)
        for snr in (0.0, 4.0, 1e6)
    }
    bias_U = denoiser.converter.bias_U.detach()
    prior = torch.distributions.Categorical(logits=bias_U).entropy().item()
    assert of[0.0]["entropy"] == pytest.approx(np.full(7, prior), rel=1e-5)
    assert of[1e6]["entropy"].max() < 1e-3
    assert of[1e6]["token"].min() > 0.999
    assert prior > of[4.0]["entropy"].mean() > of[1e6]["entropy"].mean()
    part = reading(denoiser, tokens_NL[2:], condition=AtSNR(snr=4.0), seed=0, first_row=2)
    assert part["entropy"] == pytest.approx(of[4.0]["entropy"][2:], rel=1e-5)


def test_the_corpus_is_whole_and_in_order(world: Path) -> None:
    url = str(world / "data/shards")
    manifest = read_manifest(url)
    found = held_out.read(url, "validation", 2, corpus_rows=10**6, seed=0)
    train = " ".join(tiny.documents()).split()
    # The split ends somewhere in the last fifth, and the very first word may have been cut.
    assert set(train[1 : len(train) * 8 // 10]) <= found.words <= set(train)
    # There is no j in numbers: the least frequent of V = 28 has a count of one in T + V.
    assert 1 / found.unigram.p_V.min() == pytest.approx(manifest.rows("train") * LENGTH + 28)
    few = held_out.read(url, "validation", 2, corpus_rows=3, seed=0)
    assert 1 / few.unigram.p_V.min() == pytest.approx(3 * LENGTH + 28)
    assert few.words < found.words
