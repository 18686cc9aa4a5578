"""Configurations from the plain values that JSON, YAML and command lines hold."""

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from inspect import formatannotation
from typing import Any


def read(annotation: Any, value: Any, where: str) -> Any:
    """The value of type ``annotation`` that a plain value describes.

    A dataclass is described by a mapping of its fields; the member of a union of dataclasses is
    named by the mapping's ``kind``, or by a string where it needs nothing else. A list may stand
    for a tuple and an int for a float.

    Args:
        where: what messages call the value, ``"path"`` or ``"denoiser.backbone"``.

    Raises:
        ValueError: an unknown kind or key (with the nearest known one), a missing key, or a value
            of another type or out of its range.
    """
    members = [option for option in _options(annotation) if is_dataclass(option)]
    kinds = {kind: member for member in members if (kind := _kind(member))}
    if isinstance(value, str) and value in kinds:
        value = {"kind": value}
    if isinstance(value, Mapping) and members:
        return _dataclass(_member(kinds, value, where) if kinds else members[0], value, where)
    value = tuple(value) if isinstance(value, list) else value
    if not _fits(annotation, value):
        words = [*kinds, *_words(annotation)]
        wanted = _offer(value, words) if words else f"Give {formatannotation(annotation)}"
        raise ValueError(f"{where}: {value!r} does not fit. {wanted}")
    return value


def _member(kinds: Mapping[str, Any], value: Mapping[str, Any], where: str) -> Any:
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{where}: no kind {kind!r}. {_offer(kind, kinds)}")
    return kinds[kind]


def _dataclass(member: Any, given: Mapping[str, Any], where: str) -> Any:
    settings = {f.name: f for f in fields(member)}
    name = _kind(member) or "it"
    for key in given:
        if key not in settings:
            raise ValueError(f"{where}: {name} has no setting {key!r}. {_offer(key, settings)}")
    for key, setting in settings.items():
        if key not in given and setting.default is setting.default_factory is MISSING:
            raise ValueError(f"{where}: {name} needs {key}")
    hints = typing.get_type_hints(member)
    values = {key: read(hints[key], value, f"{where}.{key}") for key, value in given.items()}
    try:
        return member(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _fits(annotation: Any, value: Any) -> bool:
    """Whether a plain value may be what an annotation asks for, with all that is in it."""
    return any(_fits_option(option, value) for option in _options(annotation))


def _fits_option(option: Any, value: Any) -> bool:
    origin, inner = typing.get_origin(option), typing.get_args(option)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple and isinstance(value, tuple):
        wanted = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(value) == len(wanted) and all(map(_fits, wanted, value))
    if origin:
        return isinstance(value, origin)
    if isinstance(value, bool):
        return option is bool
    return isinstance(value, int | float) if option is float else isinstance(value, option)


def _words(annotation: Any) -> list[str]:
    literals = [o for o in _options(annotation) if typing.get_origin(o) is typing.Literal]
    return [str(word) for literal in literals for word in typing.get_args(literal)]


def _options(annotation: Any) -> tuple[Any, ...]:
    unions = (typing.Union, types.UnionType)
    return typing.get_args(annotation) if typing.get_origin(annotation) in unions else (annotation,)


def _kind(member: Any) -> str | None:
    tags: list[Field[Any]] = [f for f in fields(member) if f.name == "kind"]
    return str(tags[0].default) if tags else None


def _offer(name: Any, candidates: Iterable[str]) -> str:
    names = sorted(candidates)
    close = get_close_matches(str(name), names, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names) or 'none'}."
