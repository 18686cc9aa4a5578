"""Laws small enough to enumerate, whose exact denoiser shows what each path should do.

`cyclic` corrects `__CDBFF` to a rotation of ABCDEFG (003 C.1, figures 1b and 2; 004 figure 3).
`two_bit` shows that the posterior of (0,0) against (1,1) depends on the sum of both tokens (000).
`windows` shows what each path reaches in few calls when the network makes no error.

Shapes: B rows, L positions, V tokens, D table dimension, S sequences of the law, T calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dsl
from dsl.paths import Clock, Hybrid, Masked, Path, Remask, SecondOrder, SentenceSDE, TokenSDE
from dsl.posterior import Posterior
from dsl.state import State
from infra.storage import Folder
from pipelines.examples import chain
from pipelines.examples.chain import ALPHABET, letters
from pipelines.report.drawing import Panels, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LETTERS = "ABCDEFG"
GARBLED = "__CDBFF"
ROWS = 2000
WINDOWS, WINDOW = 1000, 16  # texts and letters of `windows`
BATCH = 125  # rows of `windows` at a time: each is compared with all texts
ADAPTIVE = TokenSDE(gamma_max=20.0, delta=0.2)
FINE = SecondOrder(SentenceSDE(gamma_max=20.0, grid="log"))


class EvidenceRecorder:
    """A recorder of the first row's z before each call: ``[T, L, D]``."""

    name = "evidence"

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def observe(self, clock: Clock, before: State, posterior: Posterior, after: State) -> None:
        self.states.append(before.z_BLD[0])

    def result(self) -> Tensor:
        return torch.stack(self.states)


def cyclic(out: Folder, seed: int) -> dict[str, Any]:
    """Draw freely, correct soft evidence at several SNR, and correct visible wrong letters.

    ``share_exact`` is the probability of the original word given the evidence, which
    ``share_original`` of the samples should meet.
    """
    free = _recorded(rotations(5), ADAPTIVE, State.masked(ROWS, 5, 2), 51, seed)
    law = rotations(7)
    garbled_L = torch.tensor([max(LETTERS.find(letter), 0) for letter in GARBLED])
    visible_L = torch.tensor([letter in LETTERS for letter in GARBLED])

    def given(gamma: float) -> State:
        gamma_BL = torch.where(visible_L, gamma, 0.0).expand(ROWS, -1)
        tokens_BL = garbled_L.expand(ROWS, -1)
        return State.from_tokens(law.table_VD, tokens_BL, torch.zeros_like(gamma_BL), gamma_BL)

    samples, corrected = [], []
    for snr in (0.5, 1.0, 2.0):
        start = given(snr)
        exact = float(law(start.rows(torch.tensor([0]))).weights_BS[0, 0])
        for path, budget in ((ADAPTIVE, 51), (FINE, 201)):
            drawn = _recorded(law, path, start, budget, seed)
            row = {"snr": snr, "path": path.kind, "calls": drawn.calls, "share_exact": exact}
            corrected.append(row | judge(law, drawn.tokens_BL))
            samples.append(drawn)
    remask = dsl.sample(law, Remask(rule="conf"), given(math.inf), budget=10, seed=seed)

    made = _panels(["", "", f"{GARBLED}: a rotation, the original, and its exact share"])
    left, middle, right = made.axes
    _plane(left, free, LETTERS[:5], "003 fig. 1b: free, K = 5")
    _plane(middle, samples[0], LETTERS, f"003 fig. 2: {GARBLED} at SNR 0.5")
    _shares(right, corrected)
    return {
        "figure": _save(made, out, "cyclic.png"),
        "free": judge(rotations(5), free.tokens_BL),
        "corrected": corrected,
        "remasked": {"calls": remask.calls, **judge(law, remask.tokens_BL)},
    }


def two_bit(out: Folder, seed: int) -> dict[str, Any]:
    """Start from pairs of evidence that disagree; the outcome depends on their sum."""
    table_VD = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    law = dsl.ExactDenoiser(table_VD, torch.tensor([[0, 0], [1, 1]]))
    made = _panels(["two bits, 00 or 11"])
    (axes,) = made.axes
    axis = torch.linspace(-4, 4, 161, dtype=torch.float64)
    posterior = torch.sigmoid(2 * (axis[:, None] + axis[None]))
    shown = axes.contourf(axis, axis, posterior, levels=21, cmap="coolwarm")
    made.figure.colorbar(shown, ax=axes, label="p(11 | z)")
    axes.set(xlabel="z of the first token", ylabel="z of the second")
    pairs = []
    for pair in ((1.5, -0.5), (0.5, -1.5), (1.0, -1.0), (0.25, -1.0)):
        z_L = torch.tensor(pair, dtype=torch.float64)
        tokens_BL, gamma_BL = ((z_L > 0).long().expand(ROWS, -1), z_L.abs().expand(ROWS, -1))
        start = State.from_tokens(table_VD, tokens_BL, torch.zeros(ROWS, 2), gamma_BL)
        drawn = _recorded(law, FINE, start, 201, seed)
        ones_B = (drawn.tokens_BL == 1).all(1)
        pairs.append(
            {
                "z": list(pair),
                "share_valid": judge(law, drawn.tokens_BL)["share_valid"],
                "share_11": float(ones_B.double().mean()),
                "share_exact": float(torch.sigmoid(2 * z_L.sum())),
            }
        )
        z_TL = drawn.recorded["evidence"].squeeze(-1)
        inside_T = (z_TL.abs() <= 4).all(1).cummin(0).values
        axes.plot(*z_TL[inside_T].T, color="black", linewidth=0.8)
        axes.plot(*z_TL[0], "o", color="black")
    return {"figure": _save(made, out, "two_bit.png"), "pairs": pairs}


def windows(out: Folder, seed: int) -> dict[str, Any]:
    """Draw windows of real text along each path, from a law that knows only these windows.

    A path that reveals several tokens of one posterior draws them independently, and they need not
    belong together; one that raises the SNR of all tokens settles them together.
    """
    texts_SL = _windows(seed)
    table_VD = torch.randn(len(ALPHABET), 16, generator=torch.Generator().manual_seed(seed))
    law = dsl.ExactDenoiser(F.normalize(table_VD, dim=-1), texts_SL)
    rows, drawn = ROWS // 4, []
    made = _panels([f"{len(texts_SL)} windows of text, their exact posterior"])
    (axes,) = made.axes
    for name, path_of in PATHS.items():
        calls = (WINDOW // 4, WINDOW // 2, WINDOW)
        found = [judge(law, _drawn(law, path_of(budget), budget, rows, seed)) for budget in calls]
        axes.plot(calls, [row["share_valid"] for row in found], "o-", label=name)
        drawn += [
            {"path": name, "calls": budget, **row} for budget, row in zip(calls, found, strict=True)
        ]
    axes.set(xlabel=f"calls for {WINDOW} letters", ylabel="share of windows that the law knows")
    axes.set(ylim=(0, 1.05))
    axes.legend(fontsize="x-small")
    return {
        "figure": _save(made, out, "windows.png"),
        "drawn": drawn,
        "rows": rows,
        "distinct_if_exact": len(texts_SL) * (1 - (1 - 1 / len(texts_SL)) ** rows),
    }


TOYS: Mapping[str, Callable[[Folder, int], dict[str, Any]]] = MappingProxyType(
    {"cyclic": cyclic, "two_bit": two_bit, "windows": windows, "chain": chain.certify}
)
# The paths of `windows` by their number of calls.
PATHS: Mapping[str, Callable[[int], Path]] = MappingProxyType(
    {
        "masked": lambda calls: Masked(),
        "remask": lambda calls: Remask(rule="cap", eta=0.04),
        "hybrid": lambda calls: Hybrid(
            SentenceSDE(gamma_max=8.0), Masked(), (calls // 2, calls - calls // 2)
        ),
        "sentence_sde": lambda calls: SentenceSDE(gamma_max=16.0),
    }
)


def rotations(letters: int) -> dsl.ExactDenoiser:
    """All rotations of the first letters, which lie evenly on the circle; the original is first."""
    angle_V = 2 * math.pi * torch.arange(letters, dtype=torch.float64) / letters
    table_VD = torch.stack([angle_V.cos(), angle_V.sin()], dim=1)
    sequences_SL = torch.stack([torch.arange(letters).roll(-shift) for shift in range(letters)])
    return dsl.ExactDenoiser(table_VD, sequences_SL)


def judge(law: dsl.ExactDenoiser, tokens_BL: Tensor) -> dict[str, float]:
    """The share of rows that the law knows, how many different ones, and the share of those that
    are its first sequence."""
    equal_BS = (tokens_BL[:, None] == law.sequences_SL).all(-1)
    return {
        "share_valid": float(equal_BS.any(1).double().mean()),
        "distinct": int(equal_BS.any(0).sum()),
        "share_original": float(equal_BS[:, 0].double().mean()),
    }


def _recorded(
    law: dsl.ExactDenoiser, path: Path, start: State, budget: int, seed: int
) -> dsl.Sample:
    return dsl.sample(law, path, start, budget=budget, seed=seed, recorders=[EvidenceRecorder()])


def _windows(seed: int) -> Tensor:
    """``[S, L]`` distinct windows of the embedded text, in letters and spaces."""
    text = letters()
    starts = torch.randperm(len(text) - WINDOW, generator=torch.Generator().manual_seed(seed))
    found = {text[start : start + WINDOW] for start in starts[: 2 * WINDOWS].tolist()}
    return torch.tensor([[ALPHABET.index(c) for c in line] for line in sorted(found)[:WINDOWS]])


def _drawn(law: dsl.ExactDenoiser, path: Path, calls: int, rows: int, seed: int) -> Tensor:
    """``[B, L]`` tokens."""
    parts = []
    for first in range(0, rows, BATCH):
        state = State.masked(min(BATCH, rows - first), WINDOW, law.table_VD.shape[1])
        part = dsl.sample(law, path, state, budget=calls, seed=seed, first_row=first)
        parts.append(part.tokens_BL)
    return torch.cat(parts)


def _panels(titles: Sequence[str]) -> Panels:
    return panels(titles, width=5.5, height=5.0, share=False)


def _save(made: Panels, out: Folder, name: str) -> str:
    out.write_bytes(name, made.png())
    return out.url_of(name)


def _plane(axes: Axes, drawn: dsl.Sample, letters: str, title: str) -> None:
    """The z of each token in the plane from call to call, and the letter that it becomes."""
    z_TLD = drawn.recorded["evidence"]
    reach = float(z_TLD.norm(dim=-1).max())
    text = "".join(letters[token] for token in drawn.tokens_BL[0].tolist())
    for position in range(z_TLD.shape[1]):
        axes.plot(*z_TLD[:, position].T, linewidth=1, label=f"token {position + 1}")
        axes.plot(*z_TLD[0, position], "o", color="black", markersize=3)
    for index, letter in enumerate(letters):
        angle = 2 * math.pi * index / len(letters)
        place = (1.1 * reach * math.cos(angle), 1.1 * reach * math.sin(angle))
        axes.annotate(letter, place, ha="center", va="center", weight="bold")
    axes.set(title=f"{title} → {text}", aspect="equal", xlabel="z, first coordinate")
    axes.set(xlim=(-1.25 * reach, 1.25 * reach), ylim=(-1.25 * reach, 1.25 * reach))
    axes.legend(fontsize="x-small", loc="lower left")


def _shares(axes: Axes, corrected: list[dict[str, Any]]) -> None:
    labels = [f"SNR {row['snr']:g}\n{row['calls']} calls" for row in corrected]
    for shift, name in ((-0.3, "valid"), (0, "original"), (0.3, "exact")):
        places = [index + shift for index in range(len(corrected))]
        axes.bar(places, [row[f"share_{name}"] for row in corrected], 0.28, label=name)
    axes.set_xticks(range(len(corrected)), labels, fontsize="x-small")
    axes.set(ylim=(0, 1.1))
    axes.legend(fontsize="x-small", loc="upper center", ncols=3)
