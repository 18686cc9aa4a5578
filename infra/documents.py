"""JSON and YAML from untrusted files. Ambiguous or excessive documents are refused.

The libraries' own readers accept a key twice, expand aliases to gigabytes, and overflow the stack
on nested brackets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

import yaml

from infra.errors import DataError

if TYPE_CHECKING:
    from infra.storage import Folder

MOST_NODES = 100_000  # of a YAML document, with every alias expanded
# Of YAML 1.1, which the library reads, all but the numbers in which 010 is 8 and 1:30 is 90.
INT, FLOAT, MERGE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "merge"))
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
REAL = re.compile(
    r"([-+]?[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


def from_json(content: bytes | str) -> Any:
    """A JSON value; ValueError for anything else, and for a key that is there twice."""
    try:
        return json.loads(content, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def from_yaml(text: bytes | str) -> Any:
    """A YAML document of plain values; ValueError for anything else, and for a key twice."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    except (yaml.YAMLError, TypeError, LookupError, AttributeError) as error:
        # The last three are raised for values that do not fit their tag.
        raise ValueError(" ".join(str(error).split())) from None


def parse(content: bytes, form: Any, where: str, fix: str) -> Any:
    """JSON as a `form` (a dataclass, a mapping …) of exactly its keys and types.

    Raises DataError about `where`, which names the first fault.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        from_json(content)
        return TypeAdapter(form).validate_json(content, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        why = f"{path}: {first['msg']}" if path else first["msg"]
        raise DataError(where, why, fix) from None
    except ValueError as error:
        raise DataError(where, f"not JSON ({error})", fix) from None


def load(folder: Folder, name: str, form: Any, fix: str) -> Any:
    """The JSON file `name` of a folder, as `parse` reads it."""
    return parse(folder.read_bytes(name), form, folder.url_of(name), fix)


class _Loader(yaml.SafeLoader):
    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and self._size(node, {}) > MOST_NODES:
            raise ValueError(f"its aliases stand for more than {MOST_NODES:,} values")
        return node

    def _size(self, node: yaml.Node, known: dict[yaml.Node, int]) -> int:
        """The number of nodes with every alias expanded, too many if a node contains itself."""
        if node in known:
            return known[node]
        known[node] = MOST_NODES + 1  # until it is computed
        children: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            keys = [self._key(key) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for spelt in (keys, map(str, keys)):
                _once((key, None) for key in spelt)
            children = (child for pair in node.value for child in pair)
        known[node] = 1 + sum(self._size(child, known) for child in children)
        return known[node]

    def _key(self, node: yaml.ScalarNode) -> Any:
        return node.value if node.tag == MERGE else self.construct_object(node)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in (INT, FLOAT)]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(INT, INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver(FLOAT, REAL, list("-+.0123456789"))


def _once(pairs: Iterable[tuple[Hashable, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{str(key)[:80]!r} is there twice")
        found[key] = value
    return found
