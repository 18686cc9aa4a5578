"""Seeded damage to files, as disks, editors, interrupted copies and attackers may do it.

Every function draws from the `random.Random` that it is given, so a case is repeated by its seed:
`pytest tests/fuzz -k "manifest and seed17-"`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

FEW = 20
DEEP = 10_000
LONG = "x" * 10_000_000

# Stand where a number, a text, a list or a mapping should.
STRANGERS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, 2**31, 2**63, 2**64, 10**40, -(2**63),
    float("nan"), float("inf"), float("-inf"), "", "x", "0", "../../x", "/etc/passwd", "..",
    "s3://elsewhere/x", "file:///etc/passwd", "http://127.0.0.1:9/x", "\0", "a\0b", "\ud800",
    "\u202egnp.exe", "ﬀ", "é", "e\u0301", "𝔘", "\ufeff", "{{7*7}}", "%s%n", "<script>", LONG,
    [], {}, [[]], [None], ["x"], [0] * 3, {"x": 1}, {"": ""}, {"kind": []}, {"__class__": "x"},
)  # fmt: skip


def seeds(count: int) -> pytest.MarkDecorator:
    """A case for each seed, of which `make test` runs the first `FEW`; the hyphen at the end keeps
    1 apart from 17."""
    few, many = (), pytest.mark.long
    return pytest.mark.parametrize(
        "seed",
        [pytest.param(f"seed{seed}-", marks=few if seed < FEW else many) for seed in range(count)],
    )


def bytes_(rng: Random, content: bytes) -> bytes:
    """Other bytes: flipped, cut off, put in, zeroed, doubled, or none at all."""
    return rng.choice(BYTES)(rng, content)


def _flip(rng: Random, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 8, 64))):
        if damaged:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _insert(rng: Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    what = rng.choice((rng.randbytes(8), b"\0" * 64, b"\xff", b"\n", b'"', b"}", b"[" * 9))
    return content[:at] + what + content[at:]


def _span(rng: Random, content: bytes, kind: str) -> bytes:
    """The content with one span of it cut off, zeroed, removed or repeated."""
    begin, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return {
        "cut": content[:begin],
        "behead": content[begin:],
        "zero": content[:begin] + bytes(end - begin) + content[end:],
        "remove": content[:begin] + content[begin + rng.choice((1, 2, 16)) :],
        "repeat": content[:end] + content[begin:end] + content[end:],
    }[kind]


def _other(rng: Random, content: bytes) -> bytes:
    """Not the file at all."""
    return rng.choice(
        (
            b"", b"\0" * len(content), rng.randbytes(len(content)), b"null", b"[]", b"{}", b"3",
            b"\xff\xfe", b"<html>503</html>", b"[" * DEEP, b'{"a":' * DEEP, b"\x80\x04.",
            b"PK\x03\x04", b"PAR1" + content[:99] + b"PAR1",
        )
    )  # fmt: skip


BYTES: tuple[Callable[[Random, bytes], bytes], ...] = (
    _flip, _flip, _flip, _insert, _other,
    *(partial(_span, kind=kind) for kind in ("cut", "behead", "zero", "remove", "repeat")),
)  # fmt: skip


def json_(rng: Random, content: bytes) -> bytes:
    """JSON that still parses but says something else, or, one time in four, other bytes."""
    if rng.random() < 0.25:
        return bytes_(rng, content)
    if rng.random() < 0.1:
        return twice(rng, content)
    return json.dumps(tree(rng, json.loads(content))).encode()


def tree(rng: Random, value: Any) -> Any:
    """A copy of nested lists and mappings in which one place is not what it was."""
    root = [copy.deepcopy(value)]
    places = list(_places(root))
    holder, key = rng.choice(places)
    held = holder[key]
    action = rng.choice(("stranger", "stranger", "remove", "double", "rename", "swap", "nudge"))
    if action == "remove" and holder is not root:
        del holder[key]
    elif action == "double" and isinstance(held, list):
        holder[key] = held + held
    elif action == "rename" and isinstance(holder, dict):
        holder[rng.choice((f"{key}s", str(key).upper(), f"{key} ", ""))] = holder.pop(key)
    elif action == "swap":
        other, at = rng.choice(places[1:] or places)
        holder[key] = copy.deepcopy(other[at])
    elif action == "nudge" and isinstance(held, int | float):
        holder[key] = rng.choice((held + 1, held - 1, -held, held * 2, held / 2, str(held)))
    elif action == "nudge" and isinstance(held, str):
        holder[key] = rng.choice((held + " ", held[:-1], held.upper(), f"../{held}", f"/{held}"))
    else:
        holder[key] = rng.choice(STRANGERS)
    return root[0]


def _places(holder: Any) -> Any:
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    for key in keys:
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key])


def twice(rng: Random, content: bytes) -> bytes:
    """JSON with a key of its outermost object once more, with another value."""
    given = json.loads(content)
    if not isinstance(given, dict) or not given:
        return bytes_(rng, content)
    key = json.dumps(rng.choice(list(given)))
    return content.rstrip()[:-1] + f", {key}: {json.dumps(rng.choice(STRANGERS))}}}".encode()


def place(rng: Random, file: Path) -> None:
    """Something else where a file is: nothing, a folder, a link, one of its neighbours."""
    action = rng.choice(("remove", "folder", "link", "loop", "dangling", "neighbour"))
    neighbours = sorted(path for path in file.parent.iterdir() if path.is_file() and path != file)
    file.unlink()
    if action == "folder":
        file.mkdir()
    elif action == "link":
        file.symlink_to("/etc/passwd")
    elif action == "loop":
        file.symlink_to(file.name)
    elif action == "dangling":
        file.symlink_to("nowhere")
    elif action == "neighbour" and neighbours:
        shutil.copy(rng.choice(neighbours), file)


def spoil(rng: Random, file: Path, how: Callable[[Random, bytes], bytes] = bytes_) -> None:
    """Damage a file, one time in ten by what is in its place."""
    if rng.random() < 0.1:
        place(rng, file)
        return
    content = how(rng, file.read_bytes())
    file.unlink()  # which may be a link to what all cases share
    file.write_bytes(content)


def copy_of(folder: Path, to: Path) -> Path:
    """A copy of a folder that shares its files until one is replaced."""
    shutil.copytree(folder, to, copy_function=os.link)
    return to


def damaged(
    folder: Path, to: Path, seed: str, name: str, how: Callable[[Random, bytes], bytes] = bytes_
) -> Path:
    """A copy of a folder, one file of which is spoilt."""
    copied = copy_of(folder, to / folder.name)
    spoil(Random(f"{name} {seed}"), copied / name, how)
    return copied
