"""Pictures of the READMEs, each drawn from samples that are made here.

    python -m pipelines.examples.pictures OUT

`film.svg`: one text after several denoiser calls, its tokens coloured by SNR.
`paths.svg`: the SNR of every token against denoiser calls, on one path of each kind.
`windows.png`: how many texts of few calls the law knows, by path (`generate.py toy=windows`).

Shapes: T calls, B rows, L positions, S texts of a law.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import dsl
from dsl.paths import AnyPath, Hybrid, Masked, Order, Remask, SentenceSDE
from dsl.recorders import Trajectory
from infra.storage import Folder
from pipelines.examples import toys
from pipelines.examples.chain import letters
from pipelines.film import Film

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

# The film: of a law that knows so many stretches of real text and no other.
TEXTS, LETTERS = 1000, 60
STILLS = (0, 1, 2, 3, 4, 6, 10, 12, 14, 16)
WIDE, HIGH, MARGIN = 9.6, 24, 90  # pixels of a letter, of a line, and before the first letter


def film(out: Path) -> None:
    """Write `film.svg`: a text localising, one line a still."""
    vocabulary = dsl.Vocabulary.char()
    text = letters()
    step = (len(text) - LETTERS) // TEXTS
    texts = [text[start : start + LETTERS] for start in range(0, TEXTS * step, step)]
    law = dsl.ExactDenoiser(_table(vocabulary.size), torch.tensor(vocabulary.encode(texts)))
    path = Hybrid(SentenceSDE(gamma_max=1.0), Masked(), split=(10, 6))
    seen = Film(vocabulary, {})
    start = dsl.State.masked(1, LETTERS, 16)
    made = dsl.sample(law, path, start, budget=CALLS, seed=3, recorders=[seen])
    frames = made.recorded["film"]["frames"]
    lines = [_still(place, call, frames[call], vocabulary) for place, call in enumerate(STILLS)]
    width, height = MARGIN + WIDE * LETTERS + 10, HIGH * (len(STILLS) + 2)
    (out / "film.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        'font-family="monospace" font-size="16">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(lines)}'
        f"{_key(HIGH * (len(STILLS) + 1))}</svg>\n",
        encoding="utf-8",
    )


def _still(place: int, call: int, frame: Mapping[str, Any], vocabulary: dsl.Vocabulary) -> str:
    (tokens,), (gammas,), (sure,) = frame["tokens"], frame["gamma"], frame["sure"]
    y = HIGH * (place + 0.5)
    label = f'<text x="8" y="{y + 16:.0f}" fill="#666">call {call}</text>'
    cells = []
    for at, (token, gamma, percent) in enumerate(zip(tokens, gammas, sure, strict=True)):
        x = MARGIN + WIDE * at
        cells.append(
            f'<rect x="{x:.1f}" y="{y:.0f}" width="{WIDE}" height="{HIGH - 3}" '
            f'fill="{_colour(gamma)}"/>'
            f'<text x="{x:.1f}" y="{y + 16:.0f}" fill-opacity="{0.15 + 0.85 * percent / 100:.2f}">'
            f"{escape(vocabulary.decode([token]))}</text>"
        )
    return label + "".join(cells)


def _key(y: float) -> str:
    parts = [f'<text x="8" y="{y + 16:.0f}" fill="#666">SNR</text>']
    for at, (gamma, name) in enumerate([(0, "0"), (0.25, "¼"), (1, "1"), (None, "∞")]):
        x = MARGIN + 60 * at
        parts.append(
            f'<rect x="{x}" y="{y:.0f}" width="50" height="{HIGH - 3}" fill="{_colour(gamma)}" '
            f'stroke="#ccc"/><text x="{x + 18}" y="{y + 16:.0f}">{name}</text>'
        )
    return "".join(parts)


def _colour(gamma: float | None) -> str:
    """White where masked, bluer with SNR, green where revealed (None)."""
    if gamma is None:
        return "hsl(140,45%,86%)"
    share = min(math.log1p(gamma) / math.log1p(2), 1)
    return f"hsl(215,80%,{100 - 32 * share:.0f}%)"


def paths(out: Path) -> None:
    """Draw `paths.svg`: what a path decides, which is nothing but SNRs."""
    from matplotlib import pyplot

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
    texts_SL = torch.randint(27, (200, LENGTH), generator=torch.Generator().manual_seed(0))
    made = dsl.sample(
        dsl.ExactDenoiser(_table(27), texts_SL),
        path,
        dsl.State.masked(1, LENGTH, 16),
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


def _table(tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(tokens, 16, generator=generator), dim=-1)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    import matplotlib

    matplotlib.use("Agg")
    # Equal pictures from equal samples: no random ids in the files; letters stay letters.
    matplotlib.rcParams.update({"svg.hashsalt": "dsl", "svg.fonttype": "none"})
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    film(out)
    paths(out)
    toys.windows(Folder.at(str(out)), seed=0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
