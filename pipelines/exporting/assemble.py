"""One readable file of code from the modules of `dsl`, and not a second implementation.

The modules that a template imports, directly or not, follow each other in the order of their
dependencies, with their comments. What they import from each other is dropped, what they import
from elsewhere is gathered at the top. No two of them may give one name to different things.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "dsl"
WIDTH = 100


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

    Raises ValueError for source that cannot be joined, such as two functions of one name.
    """
    modules = _ordered(template)
    outer = _merged(modules)
    docstring = ast.get_docstring(modules[-1].tree, clean=False) or ""
    parts = [f'"""{docstring}"""\n\n{_imports(outer)}']
    parts += [_section(module, is_last=module is modules[-1]) for module in modules]
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
            case ast.ImportFrom(module=str(origin), names=names) if _is_inner(origin):
                if any(alias.asname for alias in names):
                    raise ValueError(f"{path}, line {node.lineno}: `as` cannot be joined")
                module.dropped.append(node)
                module.local |= {alias.name: _target(origin, alias.name) for alias in names}
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


def _is_inner(origin: str) -> bool:
    return origin.partition(".")[0] == PACKAGE


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
    """The import statements of all modules by the names that they give.

    Raises ValueError for a name that means two things.
    """
    meanings: dict[str, str] = {}
    for module in modules:
        own = dict.fromkeys(module.defined, f"what {module.name} defines")
        for name, meaning in {**module.outer, **own}.items():
            if meanings.setdefault(name, meaning) != meaning:
                raise ValueError(f"{name}: `{meanings[name]}` and `{meaning}` clash; rename one")
    return {name: meanings[name] for module in modules for name in module.outer}


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


def _section(module: Module, *, is_last: bool) -> str:
    """A module's own code, below its name and its docstring."""
    edits = [Edit(*module.span(node), "") for node in module.dropped]
    edits += _unqualified(module)
    source = module.source
    for edit in sorted(edits, reverse=True):
        source = source[: edit.start] + edit.text.encode() + source[edit.end :]
    told = "" if is_last else ast.get_docstring(module.tree) or ""
    title = module.path.relative_to(ROOT).as_posix()
    lines = ["-" * (WIDTH - 2), title, *(["", *told.splitlines()] if told else [])]
    heading = "\n".join(f"# {line}".rstrip() for line in lines)
    code = re.sub(r"\n{4,}", "\n\n\n", source.decode().strip())
    return f"{heading}\n\n\n{code}\n"


def _unqualified(module: Module) -> Iterator[Edit]:
    """`plain.read` becomes `read`; ValueError if a local variable or argument has either name."""
    packages = {name for name, (_, inner) in module.local.items() if not inner}
    found = [
        node
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in packages
    ]
    names = {*packages, *(node.attr for node in found)}
    for node in ast.walk(module.tree):
        match node:
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) if name in names:
                why = f"{name} is a local variable, and a name that has to be replaced"
                raise ValueError(f"{module.path}, line {node.lineno}: {why}")
    yield from (Edit(*module.span(node), node.attr) for node in found)
