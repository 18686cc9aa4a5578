"""The pictures of README.md can be made again, and README.md finds them."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from dsl.paths import Hybrid
from pipelines.examples import pictures

ROOT = Path(pictures.__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def test_the_film_shows_one_text_settling(tmp_path: Path) -> None:
    pictures.film(tmp_path)
    drawn = ElementTree.parse(tmp_path / "film.svg").getroot()
    lines: dict[str, str] = {}
    for text in drawn.iter(f"{SVG}text"):
        y = text.get("y") or ""
        if float(text.get("x") or 0) >= pictures.MARGIN:
            lines[y] = lines.get(y, "") + (text.text or " ")
    stills = list(lines.values())[: len(pictures.STILLS)]
    assert len(set(map(len, stills))) == 1
    assert len(stills[0]) == pictures.LETTERS
    wrong = [sum(a != b for a, b in zip(line, stills[-1], strict=True)) for line in stills]
    assert wrong[0] > wrong[1] > wrong[-1] == 0
    first = (tmp_path / "film.svg").read_bytes()
    pictures.film(tmp_path)
    assert (tmp_path / "film.svg").read_bytes() == first


def test_a_hybrid_is_drawn_as_it_walks() -> None:
    (path,) = (path for path in pictures.SHOWN.values() if isinstance(path, Hybrid))
    gamma_TL = pictures.gammas(path)
    assert len(gamma_TL) == pictures.CALLS + 1
    assert set(gamma_TL[0]) == {0.0}
    assert max(gamma_TL[path.split[0]]) == 20.0
    assert set(gamma_TL[-1]) == {float("inf")}


def test_the_readme_is_short_and_its_pictures_are_small() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1500
    held = [ROOT / name for name in re.findall(r"\]\(([^)#]+\.(?:svg|png))\)", text)]
    assert len(held) == 3
    assert sum(picture.stat().st_size for picture in held) <= 300 * 1024
