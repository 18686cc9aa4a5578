"""One readable file of code from the modules of `dsl`, and not a second implementation.

The modules that a template imports, directly or not, follow each other in the order of their
dependencies, with their comments. What they import from each other is dropped, what they import
from elsewhere is gathered at the top. A name that two modules define gets its module's name in
front.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "dsl"
WIDTH = 100
ANNOTATIONS = ("annotation", "returns")  # where a syntax tree holds them


class Edit(NamedTuple):
    """Bytes of a module's source, and what they become."""

    start: int
    end: int
    text: str


@dataclass(kw_only=True)
class Module:
    """A module: `defined` names at its top; `local` names for (module, name) of the package, where
    the name is "" for a module as a whole; `outer` import statements by the name that they give."""

    name: str
    path: Path
    source: bytes
    tree: ast.Module
    defined: set[str] = field(default_factory=set)
    local: dict[str, tuple[str, str]] = field(default_factory=dict)
    outer: dict[str, str] = field(default_factory=dict)
    dropped: list[ast.stmt] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lines = [0, *(found.end() for found in re.finditer(b"\n", self.source))]

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Where a node's source begins and ends, in bytes."""
        start, end = self._lines[node.lineno - 1], self._lines[node.end_lineno - 1]
        return start + node.col_offset, end + node.end_col_offset


def assemble(template: Path) -> str:
    """The source of one module that holds a template and all that it needs of the package.

    Raises ValueError for source that cannot be joined, such as a local variable with the name of
    something that has to be renamed.
    """
    modules = _ordered(template)
    names = _names(modules)
    outer = _merged(modules)
    docstring = ast.get_docstring(modules[-1].tree, clean=False) or ""
    parts = [f'"""{docstring}"""\n\n{_imports(outer)}']
    parts += [_section(module, names, is_last=module is modules[-1]) for module in modules]
    made = "\n\n".join(parts)
    compile(made, template.name, "exec")
    return made


def _ordered(template: Path) -> list[Module]:
    """Every module that is needed, each behind those that it imports."""
    found: dict[str, Module] = {}

    def add(name: str, path: Path) -> None:
        module = _read(name, path)
        for other, _ in module.local.values():
            if other not in found:
                add(other, _path(other))
        found[name] = module

    add(template.stem, template)
    return list(found.values())


def _path(name: str) -> Path:
    place = ROOT / name.replace(".", "/")
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _read(name: str, path: Path) -> Module:
    source = path.read_bytes()
    module = Module(name=name, path=path, source=source, tree=ast.parse(source))
    for node in module.tree.body:
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                module.dropped.append(node)
            case ast.ImportFrom(module=str(origin)) if origin.split(".")[0] == PACKAGE:
                module.dropped.append(node)
                module.local |= {a.asname or a.name: _target(origin, a.name) for a in node.names}
            case ast.Import() | ast.ImportFrom(level=0):
                module.dropped.append(node)
                module.outer |= dict(_statements(node))
            case ast.Assign(targets=[ast.Name(id="__all__")]):
                module.dropped.append(node)
            case ast.FunctionDef(name=given) | ast.ClassDef(name=given):
                module.defined.add(given)
            case (
                ast.Assign(targets=[ast.Name(id=given)]) | ast.AnnAssign(target=ast.Name(id=given))
            ):
                module.defined.add(given)
            case _:
                raise ValueError(f"{path}, line {node.lineno}: a statement that cannot be joined")
    return module


def _target(origin: str, name: str) -> tuple[str, str]:
    whole = f"{origin}.{name}"
    return (whole, "") if _path(whole).is_file() else (origin, name)


def _statements(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """(the name that an import gives, the statement for it alone)."""
    for alias in node.names:
        known_as = f" as {alias.asname}" if alias.asname else ""
        if isinstance(node, ast.ImportFrom):
            yield alias.asname or alias.name, f"from {node.module} import {alias.name}{known_as}"
        else:
            given = alias.asname or alias.name.partition(".")[0]
            yield given, f"import {alias.name}{known_as}"


def _merged(modules: list[Module]) -> dict[str, str]:
    """The import statements of all modules by the names that they give."""
    merged: dict[str, str] = {}
    for module in modules:
        for name, statement in module.outer.items():
            if merged.setdefault(name, statement) != statement:
                raise ValueError(f"{module.name}: `{statement}` and `{merged[name]}` clash")
    return merged


def _names(modules: list[Module]) -> dict[tuple[str, str], str]:
    """What each module's own names are called in the one file."""
    counts = Counter(name for module in modules for name in module.defined)
    counts.update({name for module in modules for name in module.outer})
    return {
        (module.name, name): _longer(module.name, name) if counts[name] > 1 else name
        for module in modules
        for name in module.defined
    }


def _longer(module: str, name: str) -> str:
    """`Carry` of `dsl.paths.hybrid` becomes `HybridCarry`, `_read` of `dsl.plain` `plain_read`."""
    last = module.rpartition(".")[2]
    if name.isupper():
        return f"{last.upper()}_{name}"
    if name[0].isupper():
        return "".join(word.capitalize() for word in last.split("_")) + name
    return f"{last}_{name.lstrip('_')}"


def _imports(outer: dict[str, str]) -> str:
    """The statements as linters sort them: the standard library first, a line for each module."""
    joined: dict[str, list[str]] = defaultdict(list)
    for statement in sorted(set(outer.values())):
        start, imports, what = statement.partition(" import ")
        joined[start + imports] += [what] if imports else []
    groups: list[list[str]] = [[], []]
    for start, names in sorted(joined.items(), key=lambda item: (bool(item[1]), item[0])):
        line = start + ", ".join(names)
        if len(line) > WIDTH:
            line = f"{start}(\n    " + ",\n    ".join(names) + ",\n)"
        groups[start.split()[1].split(".")[0] not in sys.stdlib_module_names].append(line)
    return "\n\n".join("\n".join(group) for group in groups)


def _section(module: Module, names: dict[tuple[str, str], str], *, is_last: bool) -> str:
    """A module's own code, below its name and its docstring."""
    edits = [Edit(*module.span(node), "") for node in module.dropped]
    edits += _renamings(module, names)
    source = module.source
    for edit in sorted(edits, reverse=True):
        source = source[: edit.start] + edit.text.encode() + source[edit.end :]
    told = "" if is_last else ast.get_docstring(module.tree) or ""
    title = module.path.relative_to(ROOT).as_posix()
    lines = ["-" * (WIDTH - 2), title, *(["", *told.splitlines()] if told else [])]
    heading = "\n".join(f"# {line}".rstrip() for line in lines)
    code = re.sub(r"\n{4,}", "\n\n\n", source.decode().strip())
    return f"{heading}\n\n\n{code}\n"


def _renamings(module: Module, names: dict[tuple[str, str], str]) -> Iterator[Edit]:
    """Where a module's source names something that is called otherwise in the one file."""
    called = {name: names[module.name, name] for name in module.defined}
    called |= {name: names[target] for name, target in module.local.items() if target[1]}
    changed = {name: new for name, new in called.items() if name != new}
    packages = {name: origin for name, (origin, inner) in module.local.items() if not inner}
    _require_unshadowed(module, {*changed, *packages})
    tops, annotations = {id(node) for node in module.tree.body}, _annotations(module.tree)
    for node in ast.walk(module.tree):
        match node:
            case ast.Attribute(value=ast.Name(id=package), attr=name) if package in packages:
                yield Edit(*module.span(node), names[packages[package], name])
            case ast.Name(id=name) if name in changed:
                yield _checked(module, module.span(node), name, changed[name])
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) if (
                id(node) in tops and name in changed
            ):
                start, _ = module.span(node)
                start = module.source.index(f" {name}".encode(), start) + 1
                yield Edit(start, start + len(name), changed[name])
            case ast.Constant(value=str(text)) if id(node) in annotations:
                words = re.sub(r"\w+", lambda word: changed.get(word[0], word[0]), text)
                yield Edit(*module.span(node), f'"{words}"')


def _annotations(tree: ast.Module) -> set[int]:
    """The ids of the nodes of annotations, but for the strings of a `Literal`, which are values."""
    found = [getattr(node, key, None) for node in ast.walk(tree) for key in ANNOTATIONS]
    parts = [part for annotation in found if annotation for part in ast.walk(annotation)]
    values = [
        part
        for literal in parts
        if isinstance(literal, ast.Subscript) and ast.unparse(literal.value) == "Literal"
        for part in ast.walk(literal)
    ]
    return {id(part) for part in parts} - {id(part) for part in values}


def _checked(module: Module, span: tuple[int, int], name: str, new: str) -> Edit:
    # Before Python 3.12, names inside of f-strings have no true positions.
    if module.source[slice(*span)] != name.encode():
        raise ValueError(f"{module.name}: {name} has to be renamed, inside an f-string too")
    return Edit(*span, new)


def _require_unshadowed(module: Module, names: set[str]) -> None:
    """ValueError for a local variable or an argument with one of these names."""
    for scope in ast.walk(module.tree):
        if not isinstance(scope, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        bound = {node.arg for node in ast.walk(scope) if isinstance(node, ast.arg)}
        variables = [node for node in ast.walk(scope) if isinstance(node, ast.Name)]
        bound |= {node.id for node in variables if not isinstance(node.ctx, ast.Load)}
        if shadowed := bound & names:
            why = f"{', '.join(shadowed)} is a local variable, and a name that has to be replaced"
            raise ValueError(f"{module.path}, line {scope.lineno}: {why}")
