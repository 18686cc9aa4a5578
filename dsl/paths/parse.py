"""A path from plain values, for callers that have neither presets nor their loader."""

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from dsl.paths.hybrid import Hybrid
from dsl.paths.stage import Stage


def from_dict(spec: str | Mapping[str, Any]) -> Stage | Hybrid:
    """The path that ``{"kind": "sentence_sde", "gamma_max": 30}`` describes.

    A path inside a path is a mapping too; one that needs no settings may be given by its kind
    alone, ``"masked"``.

    Raises:
        ValueError: an unknown kind or setting (with the nearest known one), a missing or
            impossible one.
    """
    path: Stage | Hybrid = _member("path", _members(Stage | Hybrid), spec)
    return path


def _member(where: str, members: list[Any], spec: str | Mapping[str, Any]) -> Any:
    """The dataclass among ``members`` that the kind names, made from the other entries."""
    kinds = {_kind(member): member for member in members}
    if not isinstance(spec, str | Mapping):
        raise ValueError(f"{where}: {spec!r} does not fit. {_offer(spec, kinds)}")
    given = {"kind": spec} if isinstance(spec, str) else dict(spec)
    kind = given.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"{where}: no kind {kind!r}. {_offer(kind, kinds)}")
    hints = typing.get_type_hints(kinds[kind])
    settings = {f.name: f for f in fields(kinds[kind]) if f.name != "kind"}
    for name in given:
        if name not in settings:
            raise ValueError(f"{where}: {kind} has no setting {name!r}. {_offer(name, settings)}")
    for name, setting in settings.items():
        if name not in given and setting.default is MISSING:
            raise ValueError(f"{where}: {kind} needs {name}")
    values = {name: _value(f"{where}.{name}", hints[name], v) for name, v in given.items()}
    try:
        return kinds[kind](**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _value(where: str, annotation: Any, value: Any) -> Any:
    members = _members(annotation)
    kinds = {_kind(member) for member in members}
    if members and (isinstance(value, Mapping) or value in kinds):
        return _member(where, members, value)
    value = tuple(value) if isinstance(value, list) else value
    if not any(_fits(option, value) for option in _options(annotation)):
        words = [*kinds, *map(str, _words(annotation))]
        wanted = _offer(value, words) if words else f"Give {annotation}"
        raise ValueError(f"{where}: {value!r} does not fit. {wanted}")
    return value


def _fits(option: Any, value: Any) -> bool:
    """Whether a plain value may be what a setting's annotation, or one of its options, asks."""
    if typing.get_origin(option) is typing.Literal:
        return value in typing.get_args(option)
    if typing.get_origin(option) is tuple:
        return isinstance(value, tuple)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number if option is float else isinstance(value, option)


def _words(annotation: Any) -> list[Any]:
    literals = (o for o in _options(annotation) if typing.get_origin(o) is typing.Literal)
    return [word for literal in literals for word in typing.get_args(literal)]


def _members(annotation: Any) -> list[Any]:
    return [option for option in _options(annotation) if is_dataclass(option)]


def _options(annotation: Any) -> tuple[Any, ...]:
    unions = (typing.Union, types.UnionType)
    return typing.get_args(annotation) if typing.get_origin(annotation) in unions else (annotation,)


def _kind(member: Any) -> str:
    return str(next(f.default for f in fields(member) if f.name == "kind"))


def _offer(name: Any, candidates: Iterable[str]) -> str:
    names = sorted(candidates)
    close = get_close_matches(str(name), names, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names) or 'none'}."
