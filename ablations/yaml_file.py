"""Reads the YAML of studies and clusters: plain data, each key once, and no more of it than a person writes."""

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from ..kernels.errors import InputError

DEPTH = 50  # levels of lists and mappings, with those that aliases repeat
VALUES = 100_000  # texts, numbers, lists and mappings, each as often as aliases repeat it
TYPES = ("str", "int", "float", "bool", "null", "seq", "map", "merge")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file in UTF-8: texts, numbers, booleans, None, lists, and mappings with texts as keys.

    Raises FileNotFoundError if there is no file, and InputError, one line, if it cannot be read, is not YAML, has a key
    twice or a value of another type, or has more than `VALUES` values or `DEPTH` levels.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are not UTF-8, and values such as `!!int x`
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


class Loader(yaml.SafeLoader):
    """YAML that loses no value in silence, and whose aliases do not make a short file long."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.level = 0
        self.extents: dict[int, tuple[int, int]] = {}  # by the id of a complete node: its values, and its levels

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark, alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self.level += 1
        if self.level > DEPTH:  # before the parser itself is too deep
            raise _too_deep(mark)
        node = super().compose_node(parent, index)
        self.level -= 1
        if node is None or id(node) in self.extents:
            return node
        if alias:
            raise ConstructorError(None, None, "an alias is part of what it repeats", mark)
        extents = [self.extents[id(part)] for part in _checked_parts(node)]
        values, levels = 1 + sum(one for one, _ in extents), 1 + max((one for _, one in extents), default=0)
        if values > VALUES:
            raise ConstructorError(None, None, f"more than {VALUES:,} values, with those that aliases repeat", mark)
        if levels > DEPTH:
            raise _too_deep(mark)
        self.extents[id(node)] = values, levels
        return node


def _too_deep(mark: Any) -> ConstructorError:
    return ConstructorError(None, None, f"more than {DEPTH} levels of lists and mappings", mark)


def _checked_parts(node: yaml.Node) -> list[yaml.Node]:
    """The keys and values in a list or mapping; none of another node. Raises ConstructorError as `read_yaml` says."""

    def error(text: str, part: yaml.Node = node) -> ConstructorError:
        return ConstructorError(None, None, text, part.start_mark)

    kind = node.tag.rsplit(":", 1)[-1]
    if isinstance(node, yaml.ScalarNode):
        if kind not in TYPES:
            raise error(f"{node.value!r} is a {kind}, which has no place here; put a text in quotes")
        if not is_text(node.value):
            raise error(f"{node.value!r} is not text: it has a NUL or half a character")
        return []
    if kind not in TYPES:
        raise error(f"a {kind} has no place here; write a list or a mapping")
    if not isinstance(node, yaml.MappingNode):
        return node.value
    names: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag.rsplit(":", 1)[-1] not in ("str", "merge"):
            raise error(f"the key {getattr(key, 'value', '')!r} is not a text; put it in quotes", key)
        if key.value in names:
            raise error(f"key {key.value!r} occurs twice", key)
        names.add(key.value)
    return [part for pair in node.value for part in pair]


def is_text(value: str) -> bool:
    """Whether UTF-8 can write it, and files can be named so: without NUL, and without half of a surrogate pair."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False
