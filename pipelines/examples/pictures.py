"""The pictures of README.md, each drawn from samples that are made here.

    python -m pipelines.examples.pictures OUT

`paths.svg`: the SNR of every token against denoiser calls, on one path of each kind.
`film.png` is a photograph of a page and is not made here.

Shapes: T calls, B rows, L positions.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

import dsl
from dsl.paths import AnyPath, Hybrid, Masked, Order, Remask, SentenceSDE
from dsl.recorders import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CALLS, LENGTH = 16, 12
INFINITE = 1000.0  # where SNR infinity is drawn
TICKS: Mapping[float, str] = {0: "0", 1: "1", 10: "10", 100: "100", INFINITE: "∞"}
SHOWN: Mapping[str, AnyPath] = {
    "Masked": Masked(),
    "Order": Order("left_to_right"),
    "Remask": Remask(rule="cap", eta=0.3),
    "SentenceSDE": SentenceSDE(gamma_max=60.0, grid="log"),
    "Hybrid, 8 + 8": Hybrid(SentenceSDE(gamma_max=20.0, grid="log"), Masked(), split=(8, 8)),
}


def paths(out: Path) -> None:
    """Draw `paths.svg`: what a path decides, which is nothing but SNRs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Equal pictures from equal samples: no date and no random ids in the file.
    matplotlib.rcParams.update({"svg.hashsalt": "paths", "svg.fonttype": "none"})
    figure, panels = pyplot.subplots(
        1, len(SHOWN), figsize=(12, 2.6), sharey=True, layout="constrained"
    )
    for axes, (name, path) in zip(panels, SHOWN.items(), strict=True):
        _panel(axes, name, gammas(path))
    panels[0].set_ylabel("SNR of each token")
    figure.savefig(out / "paths.svg", metadata={"Date": None})
    pyplot.close(figure)


def gammas(path: AnyPath) -> Sequence[Sequence[float]]:
    """The SNR of one text's tokens before the first call and after each: T + 1 rows of L."""
    generator = torch.Generator().manual_seed(0)
    table_VD = F.normalize(torch.randn(27, 16, generator=generator), dim=-1)
    texts_SL = torch.randint(27, (200, LENGTH), generator=generator)
    start = dsl.State.masked(1, LENGTH, 16)
    made = dsl.sample(
        dsl.ExactDenoiser(table_VD, texts_SL),
        path,
        start,
        budget=CALLS,
        seed=0,
        recorders=[Trajectory()],
    )
    return made.recorded["trajectory"]["gamma_TBL"][:, 0].tolist()


def _panel(axes: Axes, name: str, gamma_TL: Sequence[Sequence[float]]) -> None:
    axes.set_yscale("symlog", linthresh=1.0)
    for token, gamma_T in enumerate(zip(*gamma_TL, strict=True)):
        shown_T = [min(gamma, INFINITE) * (1 + 0.015 * token) for gamma in gamma_T]
        axes.step(range(len(shown_T)), shown_T, where="post", linewidth=1, alpha=0.8)
    axes.set_yticks(list(TICKS), list(TICKS.values()))
    axes.minorticks_off()
    axes.set(title=name, xlabel="denoiser calls", xlim=(0, CALLS + 0.7), ylim=(-0.2, 2 * INFINITE))
    axes.set_xticks([0, CALLS // 2, CALLS])


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    paths(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
