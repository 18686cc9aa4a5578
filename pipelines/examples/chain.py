"""Samplers on trial before an exact judge: a Markov chain fitted to real text.

The denoiser is exact, so whatever a sampler's texts lack is the sampler's own error in few calls:
no network and no judge has a part in it (compare arXiv 2602.19619).

Shapes: B rows, L positions, V tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dsl
from dsl.chain import ChainDenoiser
from dsl.paths import (
    AnyPath,
    EntropyBounded,
    Hybrid,
    Masked,
    Order,
    Remask,
    SecondOrder,
    SentenceSDE,
    TokenSDE,
)
from infra.storage import Folder
from pipelines.corpus import embedded
from pipelines.report.drawing import panels

ALPHABET = " abcdefghijklmnopqrstuvwxyz"
LENGTH, DIM, ROWS = 64, 16, 192
BUDGETS = (LENGTH // 8, LENGTH // 4, LENGTH // 2)
LAW = "the chain itself"


def walks(calls: int) -> dict[str, AnyPath]:
    """A path of every kind in as many calls; a hybrid gives half of them to its first stage."""
    soft = SentenceSDE(gamma_max=12.0, grid="log")
    remask: dict[str, AnyPath] = {
        f"remask {rule}": Remask(rule=rule)
        for rule in ("cap", "rescale", "conf", "loop", "forward_backward")
    }
    return {
        "masked": Masked(),
        **remask,
        "order random": Order("random"),
        "entropy_bounded": EntropyBounded(bound=0.5),
        "sentence_sde": SentenceSDE(gamma_max=30.0, grid="log"),
        "second_order": SecondOrder(SentenceSDE(gamma_max=30.0, grid="log")),
        "token_sde": TokenSDE(gamma_max=30.0, delta=0.2),
        "hybrid": Hybrid(SecondOrder(soft), Masked(), split=(calls // 2, calls - calls // 2)),
    }


def certify(out: Folder, seed: int) -> dict[str, Any]:
    """Draw texts along every path and hold their letters and pairs against the law itself.

    ``divergence`` is the Kullback-Leibler divergence, in nats, of the transitions that the texts
    make from those of the chain (both weighted by how often the texts are in a state): 0 but for
    the number of texts, which `LAW`, the row of the chain's own draws, shows. ``nats`` is the exact
    -log P of the texts per token, which should be that of `LAW` and neither more nor less.
    """
    ids = torch.tensor([ALPHABET.index(c) for c in letters()])
    letters_NL = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    generator = torch.Generator().manual_seed(seed)
    table_VD = F.normalize(torch.randn(len(ALPHABET), DIM, generator=generator), dim=-1)
    law = ChainDenoiser.fit(table_VD, letters_NL, order=1)
    drawn = [{"path": LAW, "calls": None, **_judged(law, law.draw(ROWS, LENGTH, seed))}]
    for budget in BUDGETS:
        for name, path in walks(budget).items():
            start = dsl.State.masked(ROWS, LENGTH, DIM)
            made = dsl.sample(law, path, start, budget=budget, seed=seed)
            drawn.append({"path": name, "calls": budget, **_judged(law, made.tokens_BL)})
    return {"figure": _draw(drawn, out), "drawn": drawn, "rows": ROWS, "length": LENGTH}


def letters() -> str:
    """The embedded text in letters and single spaces."""
    found = "".join(c if c in ALPHABET else " " for c in "\n".join(embedded()).lower())
    return " ".join(found.split())


def _judged(law: ChainDenoiser, tokens_BL: Tensor) -> dict[str, float]:
    nats_B = -law.log_prob(tokens_BL) / tokens_BL.shape[1]
    tokens = len(law.table_VD)
    pairs_N = (tokens_BL[:, :-1] * tokens + tokens_BL[:, 1:]).flatten()
    count_VV = torch.bincount(pairs_N, minlength=tokens**2).double().view(tokens, tokens)
    found_VV = count_VV / count_VV.sum(1, keepdim=True).clamp_min(1)
    gap_VV = torch.where(
        found_VV > 0, found_VV.clamp_min(1e-300).log() - law.transition_VRV[:, 0], 0
    )
    return {
        "divergence": float((count_VV * gap_VV).sum() / count_VV.sum()),
        "nats": float(nats_B.mean()),
        "nats_stderr": float(nats_B.std() / math.sqrt(len(nats_B))),
    }


def _draw(drawn: list[dict[str, Any]], out: Folder) -> str:
    made = panels(["Samplers of an exact denoiser"], width=7.0, height=5.0, share=False)
    (axes,) = made.axes
    lines: dict[str, list[tuple[int, float]]] = {name: [] for name in walks(BUDGETS[0])}
    for row in drawn[1:]:
        lines[row["path"]].append((row["calls"], row["divergence"]))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.axhline(drawn[0]["divergence"], color="black", linestyle=":", label=LAW)
    axes.set(xscale="log", yscale="log", xlabel=f"denoiser calls for {LENGTH} letters")
    axes.set(ylabel="divergence of transitions, nats")
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.minorticks_off()
    axes.legend(fontsize="x-small", ncols=2)
    out.write_bytes("chain.png", made.png())
    return out.url_of("chain.png")
