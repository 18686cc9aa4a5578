"""What is asked of models: invariant to batches, and right where there is a closed form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsl.likelihood import path_integral
from dsl.noise import Draws
from dsl.state import State
from dsl.vocabulary import Vocabulary
from infra.errors import ConfigError
from infra.shards import read_manifest
from pipelines.evaluation import held_out
from pipelines.evaluation.conditions import AtSNR, Revealed
from pipelines.evaluation.metrics import text_bytes
from pipelines.evaluation.questions.converter import reading
from pipelines.evaluation.questions.likelihood import (
    Likelihood,
    LikelihoodConfig,
    Nats,
    View,
    views,
)
from pipelines.evaluation.questions.states import errors
from pipelines.kinds import AR, DSL, MDLM
from tests.dsl.laws import random_law
from tests.pipelines import tiny
from tests.pipelines.evaluation.conftest import Run
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


def test_a_share_is_not_a_token_less_for_being_a_float() -> None:
    for percent in range(100):
        gamma_BL = Revealed(share=percent / 100).gamma(1, 100, Draws(0, 0, 0))
        assert gamma_BL.isinf().sum() == percent
    # And some token stays masked, or there would be nothing to measure.
    assert Revealed(share=0.99).gamma(1, 32, Draws(0, 0, 0)).isinf().sum() == 31


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


# --- the likelihood under unmasking --------------------------------------------------------------

UNMASKED: Any = SimpleNamespace(likelihood=LikelihoodConfig(unmasking_rows=9), seed=0)
EVERY_SL = torch.cartesian_prod(*[torch.arange(3)] * 4)


def under_unmasking(denoiser: Any) -> np.ndarray:
    """The probability of every text by the question's own view."""
    asked = Likelihood().asked(UNMASKED, MDLM)
    nats_S = np.array(asked["unmasking"](denoiser, EVERY_SL, first_row=0)["nats"])
    return np.exp(-4 * nats_S)


def test_unmasking_with_the_exact_posterior_is_the_law() -> None:
    law = random_law(tokens=3, length=4, dim=2, seed=3)
    expected_S = (-4 * law.nats(EVERY_SL)).exp().numpy()
    assert under_unmasking(law.denoiser()) == pytest.approx(expected_S, abs=1e-6)


@torch.no_grad()
def test_unmasking_of_a_network_is_the_product_of_its_draws() -> None:
    """Each text by hand: the hidden token of least entropy is the next one."""
    denoiser = network(3).double()
    found_S = under_unmasking(denoiser)
    assert found_S.sum() == pytest.approx(1, abs=1e-6)
    for tokens_L, found in zip(EVERY_SL, found_S, strict=True):
        known_L, chance = torch.zeros(4, dtype=torch.bool), 1.0
        for _ in range(4):
            state = State.from_tokens(denoiser.table_VD, tokens_L[None], known_L[None])
            log_probs_LV = denoiser(state).log_probs()[0]
            entropy_L = torch.special.entr(log_probs_LV.exp()).sum(1)
            at = int(entropy_L.masked_fill(known_L, torch.inf).argmin())
            chance *= float(log_probs_LV[at, tokens_L[at]].exp())
            known_L[at] = True
        assert found == pytest.approx(chance, abs=1e-6)


def test_the_first_rows_are_unmasked(run: Run, world: Path, tmp_path: Path) -> None:
    models = ", ".join(f"{kind}: {world / kind}" for kind in ("mdlm", "ar", "flat"))
    code, _, err = run(f"models={{{models}}}", "likelihood.unmasking_rows=3")
    assert code == 0, err
    tables = json.loads((tmp_path / "judged/report/evaluation.json").read_text())
    rows = {row["model"]: row for row in tables["likelihood"] if row["view"] == "unmasking"}
    assert list(rows) == ["mdlm", "flat"]
    assert rows["flat"]["nats_per_token"] == pytest.approx(math.log(28), rel=1e-5)
    rows_NL = rows_of(world, 3)
    bits = math.log2(28) * rows_NL.size / text_bytes(rows_NL, Vocabulary.char()).sum()
    assert rows["flat"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_no_more_rows_are_unmasked_than_there_are() -> None:
    with pytest.raises(ValueError, match="unmasking_rows is 9, and rows 8"):
        LikelihoodConfig(rows=8, unmasking_rows=9)


def test_no_contour_is_integrated_twice() -> None:
    with pytest.raises(ValueError, match="contours holds staggered twice"):
        LikelihoodConfig(contours=("staggered", "diffusion", "staggered"))


@pytest.mark.parametrize("view", ["endpont_bound", "hybrid_bound_7", "unmasking"])
def test_a_view_that_no_model_has_is_refused_of_an_exact_model_too(view: str) -> None:
    survey: Any = SimpleNamespace(
        kinds={"ar": AR}, config=SimpleNamespace(likelihood=ASKED, seed=0)
    )
    for known in ("endpoint_bound", "hybrid_bound_4", "exact"):
        Nats(view=known).require(survey, "ar")
    with pytest.raises(ConfigError, match=f"{view} is no view .* Name one of: .*hybrid_bound_9"):
        Nats(view=view).require(survey, "ar")
