"""Configuration: dataclass defaults < preset < `key.sub=value`, as one frozen dataclass.

A preset is a YAML file with one mapping per verb; a verb reads its own. Each source is a layer, and
the layers are merged field by field: mappings merge, a later value replaces an earlier one, and a
new `kind` of a union drops what earlier layers said about the old kind. A union member that needs
only its kind may be written as a string: `path: masked`. Override values are YAML scalars, or YAML
lists and mappings in [] and {}.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from infra import documents
from infra.errors import ConfigError, nearest

T = TypeVar("T")
Tree = dict[str, Any]

MOST_BYTES = 1 << 20  # of a preset
# Keys of mappings, such as the sources of a mixture, may hold dashes and spaces.
OVERRIDE = re.compile(r"([A-Za-z_]\w*(?:\.\w[\w -]*)*)=(.*)", re.DOTALL)
REQUIRED = dataclasses.MISSING


class Field(NamedTuple):
    """One line of `--help`."""

    key: str
    type: str
    default: str


class Layer(NamedTuple):
    """The value that one source gives for one place in the configuration."""

    source: str
    value: Any

    def __getitem__(self, key: Any) -> Any:
        return Layer(self.source, self.value[key])


def load(
    config_type: type[T],
    *,
    verb: str,
    argv: Sequence[str],
    presets: Path,
    verbs: Sequence[str] | None = None,
) -> T:
    """The configuration of `verb` from `[PRESET] [key.sub=value …]`.

    PRESET is a name in the folder `presets`, a path that ends in .yaml, or any fsspec URL.
    verbs: the sections that a preset may have; None allows any.
    Raises ConfigError with the dotted path, the source and what was expected there.
    """
    layers: list[Layer] = []
    names = [argument for argument in argv if not OVERRIDE.fullmatch(argument)]
    if len(names) > 1:
        raise ConfigError(
            "command line", f"one preset at most, got {' and '.join(names)}", "Write key=value"
        )
    if names:
        layers.append(Layer(names[0], _section(names[0], verb, verbs, presets)))
    for argument in argv:
        if match := OVERRIDE.fullmatch(argument):
            layers.append(Layer("command line", _nested(match[1].split("."), _value(argument))))
    return _dataclass(config_type, layers, "")


def overridden(config: T, settings: Mapping[str, Any], source: str) -> T:
    """The configuration with other values at dotted keys, later ones over earlier ones.

    source: named in the ConfigError for an unknown key or a wrong value.
    """
    layers = [Layer(source, _nested(key.split("."), to_tree(v))) for key, v in settings.items()]
    return _dataclass(type(config), [Layer("base", to_tree(config)), *layers], "")


def parse(text: bytes | str, where: str) -> Any:
    """A YAML document of text, numbers, lists and mappings; ConfigError for any other."""
    try:
        content = documents.from_yaml(text)
    except ValueError as error:
        raise ConfigError(where, f"not YAML: {error}") from None
    _require_plain(content, where)
    return content


def to_yaml(config: Any, verb: str) -> str:
    """The whole configuration as a preset; loading it gives an equal object."""
    tree = {verb: to_tree(config)}
    # PyYAML writes U+0085 as a line break, which it reads as a space, unless it escapes all.
    readable = "\x85" not in json.dumps(tree, ensure_ascii=False)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=readable)


def to_tree(value: Any) -> Any:
    """The value in plain types: dataclasses as mappings, tuples as lists, paths as text."""
    if dataclasses.is_dataclass(value):
        return {
            f.name: to_tree(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init
        }
    if isinstance(value, dict):
        return {str(key): to_tree(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_tree(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flatten(config: Any) -> dict[str, str | int | float | bool | None]:
    """{dotted key: scalar}; lists and empty mappings are written as JSON."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and (value or not prefix):  # the root may be empty
            for key, item in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, item)
        else:
            yield prefix, json.dumps(value) if isinstance(value, dict | list) else value

    return dict(walk("", to_tree(config)))


def digest(config: Any) -> str:
    """Twelve hex digits of the sha256 of the resolved configuration."""
    text = json.dumps(to_tree(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def at_least(least: int, config: Any, *names: str) -> None:
    """ValueError for a field of these that is smaller; one that is None passes."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def describe(config_type: Any) -> Iterator[Field]:
    """Every field a user may set, for `--help`; a union lists the fields of each kind."""

    def walk(owner: Any, prefix: str, given: Any, note: str, outer: tuple[Any, ...]) -> Any:
        for field, annotation in _fields(owner).values():
            key, default = f"{prefix}{field.name}", getattr(given, field.name, _default(field))
            members = _members(annotation)
            kinds = _kinds(members)
            optional = members and not kinds and default is None
            if (not members or str in _options(annotation) or optional) and field.name != "kind":
                shown = "required" if default is REQUIRED else json.dumps(to_tree(default))
                yield Field(key, _spell(annotation) + note, shown)
            if kinds:
                shown = "required" if default is REQUIRED else getattr(default, "kind", "null")
                yield Field(key, " | ".join(kinds) + note, shown)
            for member in members:
                if member not in outer:  # a path may hold paths
                    known = default if isinstance(default, member) else None
                    of = next((f" ({kind})" for kind in kinds if kinds[kind] is member), note)
                    yield from walk(member, f"{key}.", known, of, (*outer, member))

    return walk(config_type, "", None, "", ())


def offered(verb: str, presets: Path) -> list[str]:
    """The presets of the folder that have a section for the verb."""
    files = sorted(presets.glob("*.yaml"))
    return [file.stem for file in files if verb in (parse(file.read_bytes(), file.name) or ())]


# --- sources ---------------------------------------------------------------------------------


def _section(preset: str, verb: str, verbs: Sequence[str] | None, presets: Path) -> Tree:
    """The section of the preset for `verb`."""
    content = parse(_read(preset, presets), preset)
    if not isinstance(content, dict):
        raise ConfigError(preset, "not a mapping of verbs", f"Put the settings under `{verb}:`")
    for name in content:
        if verbs is not None and name not in verbs:
            raise ConfigError(f"{preset}: {name}", "no such verb", _hint(str(name), verbs))
    if verb not in content:
        raise ConfigError(preset, f"no section `{verb}`", f"It has {', '.join(content)}")
    return content[verb] or {}


def _read(preset: str, presets: Path) -> str:
    import fsspec

    from infra.storage import explained

    if not preset.endswith((".yaml", ".yml")) and "://" not in preset:
        names = sorted(path.stem for path in presets.glob("*.yaml"))
        if preset not in names:
            raise ConfigError(preset, "no such preset", _hint(preset, names))
        preset = str(presets / f"{preset}.yaml")
    with explained(preset):  # what a store raises need not be an OSError
        try:
            with fsspec.open(preset, "rt", encoding="utf-8") as file:
                text = file.read(MOST_BYTES)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(preset, f"cannot be read: {error}") from error
    if len(text) == MOST_BYTES:
        raise ConfigError(preset, "far longer than any preset", "Give a file of settings")
    return text


def _value(argument: str) -> Any:
    """The value of `key=value`: a YAML number, truth value, null, list or mapping, else text."""
    text = argument.partition("=")[2]
    flow = text[:1] in ("[", "{", "'", '"')
    try:
        parsed = documents.from_yaml(text)
    except ValueError as error:
        if flow:
            fix = "Quote text that starts like a list"
            raise ConfigError(argument, f"not YAML: {error}", fix) from None
        parsed = text
    if not (flow or parsed is None or isinstance(parsed, bool | int | float)):
        parsed = text
    _require_plain(parsed, argument)
    return parsed


def _require_plain(value: Any, where: str) -> None:
    """ConfigError for a YAML value that no setting can have."""
    if isinstance(value, dict | list):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        for item in items:
            _require_plain(item, where)
        return
    refused = {
        "text with a NUL or half of a surrogate pair": isinstance(value, str)
        and re.search("[\0\ud800-\udfff]", value),
        "a whole number of more than 64 bits": isinstance(value, int)
        and not -(1 << 63) <= value < 1 << 63,
        "a NaN": isinstance(value, float) and math.isnan(value),
        f"a {type(value).__name__}": not isinstance(value, str | int | float | None),
    }
    for why in filter(refused.get, refused):
        raise ConfigError(
            where, f"{why} is no setting", "Write text, a number, a list or a mapping"
        )


def _nested(keys: Sequence[str], value: Any) -> Any:
    return functools.reduce(lambda inner, key: {key: inner}, reversed(keys), value)


# --- merging the layers along the types ------------------------------------------------------


def _build(annotation: Any, layers: list[Layer], path: str) -> Any:
    """The value of type `annotation` at `path`, from the layers, weakest first."""
    last = layers[-1]
    if last.value is not None:
        # A null discards the layers before it.
        nulls = [i for i, layer in enumerate(layers) if layer.value is None]
        layers = layers[max(nulls, default=-1) + 1 :]
        annotation = _without_none(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if last.value is None and type(None) in arguments:
        return None
    if members := _members(annotation):
        if str in _options(annotation):  # text, or a mapping that replaces it
            if isinstance(last.value, str):
                return last.value
            texts = [i for i, layer in enumerate(layers) if isinstance(layer.value, str)]
            layers = layers[max(texts, default=-1) + 1 :]
        kinds = _kinds(members)
        return _kind(kinds, layers, path) if kinds else _dataclass(members[0], layers, path)
    if origin is dict and isinstance(last.value, dict):
        merged: dict[str, list[Layer]] = {}
        _require_mappings(layers, path)
        for layer in layers:
            for key in layer.value:
                merged.setdefault(str(key), []).append(layer[key])
        return {key: _build(arguments[1], found, f"{path}.{key}") for key, found in merged.items()}
    if origin is tuple and isinstance(last.value, list):
        size = len(last.value)
        types_ = arguments[:1] * size if arguments[-1] is Ellipsis else arguments
        if len(types_) != size:
            raise _wrong(annotation, last, path)
        return tuple(_build(t, [last[i]], f"{path}.{i}") for i, t in enumerate(types_))
    return _leaf(annotation, last, path)


def _kind(kinds: dict[str, Any], layers: list[Layer], path: str) -> Any:
    """The member of a union that the last `kind` names, from the layers since it was named."""
    kind, kept = next(iter(kinds)) if len(kinds) == 1 else None, []
    for layer in layers:
        if isinstance(layer.value, str):
            layer = Layer(layer.source, {"kind": layer.value})
        _require_mappings([layer], path)
        named = layer.value.get("kind", kind)
        if not isinstance(named, str) or named not in kinds:
            why = "missing" if named is None else f"no kind {named!r}"
            raise ConfigError(_where(layer, f"{path}.kind"), why, _hint(str(named), kinds))
        kept = [*kept, layer] if named == kind else [layer]
        kind = named
    return _dataclass(kinds[kind], kept, path)


def _dataclass(config_type: type[T], layers: list[Layer], path: str) -> T:
    fields, dotted = _fields(config_type), f"{path}." if path else ""
    _require_mappings(layers, path)
    for layer in layers:
        for key in layer.value:
            if key not in fields:
                raise ConfigError(
                    _where(layer, f"{dotted}{key}"), "no such key", _hint(str(key), fields)
                )
    values = {}
    for name, (field, annotation) in fields.items():
        found = [layer[name] for layer in layers if name in layer.value]
        default = _default(field)
        if found:
            known = [] if default is REQUIRED else [Layer("default", to_tree(default))]
            values[name] = _build(annotation, known + found, f"{dotted}{name}")
        elif default is REQUIRED:
            # A required dataclass whose own fields all have defaults need not be mentioned.
            members = _members(annotation)
            if len(members) != 1 or str in _options(annotation):
                raise ConfigError(f"{dotted}{name}", f"required, a {_spell(annotation)}", "Set it")
            values[name] = _dataclass(members[0], [], f"{dotted}{name}")
    try:
        return config_type(**values)
    except ValueError as error:
        raise ConfigError(path or config_type.__name__, str(error)) from error


def _leaf(annotation: Any, layer: Layer, path: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    if isinstance(layer.value, bool) and {bool, Any}.isdisjoint(_options(annotation)):
        raise _wrong(annotation, layer, path)  # pydantic would take `yes` for 1
    try:
        value = TypeAdapter(annotation).validate_python(layer.value)
    except ValidationError:
        raise _wrong(annotation, layer, path) from None
    if isinstance(value, float) and math.isnan(value):  # which text can spell
        raise _wrong(annotation, layer, path)
    return value


def _require_mappings(layers: list[Layer], path: str) -> None:
    for layer in layers:
        if not isinstance(layer.value, dict):
            raise _wrong(dict, layer, path)


# --- types and messages ----------------------------------------------------------------------


@functools.cache
def _fields(config_type: Any) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(config_type)
    return {f.name: (f, hints[f.name]) for f in dataclasses.fields(config_type) if f.init}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _options(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _without_none(annotation: Any) -> Any:
    return typing.Union[tuple(o for o in _options(annotation) if o is not type(None))]  # noqa: UP007


def _members(annotation: Any) -> list[Any]:
    """The dataclasses that a field may hold, empty for a leaf."""
    return [option for option in _options(annotation) if dataclasses.is_dataclass(option)]


def _kinds(members: list[Any]) -> dict[str, Any]:
    """{kind: member}, empty for a plain dataclass."""
    kinds = {_default(_fields(m)["kind"][0]): m for m in members if "kind" in _fields(m)}
    if len(members) > 1 and len(kinds) < len(members):
        raise TypeError(f"a union needs one `kind` a member: {members}")
    return kinds


def _spell(annotation: Any) -> str:
    """The type as its value would be written: `[float, float]`, `{str: [int, …], …}`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        members = _members(annotation)
        rest = [_spell(option) for option in arguments if option not in members]
        return " | ".join([*(_kinds(members) or map(_spell, members)), *rest])
    if origin is dict:
        key, value = map(_spell, arguments)
        return f"{{{key}: {value}, …}}"
    if origin is tuple:
        return f"[{', '.join('…' if a is Ellipsis else _spell(a) for a in arguments)}]"
    if dataclasses.is_dataclass(annotation):
        return " | ".join(_kinds([annotation])) or f"{{{', '.join(_fields(annotation))}}}"
    return "null" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))


def _where(layer: Layer, path: str) -> str:
    return f"{path or 'configuration'} ({layer.source})"


def _wrong(annotation: Any, layer: Layer, path: str) -> ConfigError:
    expected = "a mapping" if annotation is dict else _spell(annotation)
    hint = ""
    if typing.get_origin(annotation) is typing.Literal and isinstance(layer.value, str):
        hint = _hint(layer.value, map(str, typing.get_args(annotation)))
    elif str in _options(annotation):
        hint = "Quote it to keep it text: \"'…'\""
    return ConfigError(_where(layer, path), f"expected {expected}, got {layer.value!r}", hint)


def _hint(name: str, candidates: Iterable[str]) -> str:
    names = list(candidates)
    close = nearest(name, names)
    return f"Did you mean `{close}`?" if close else f"Known: {', '.join(names) or 'none'}"
