"""A YAML document whose every value knows where it stands, so that an error can name file, line and path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from uncollapse.errors import ConfigError, DataError


@dataclass(frozen=True)
class Located:
    """A scalar, a list of `Located` or a dict of them by key, with its place in the document."""

    value: Any
    source: str = ""
    line: int | None = None
    path: str = ""

    def __iter__(self) -> Iterator[Located]:
        return iter(self.value)

    @property
    def place(self) -> str:
        """`recipe.yaml:7: weights[0].clip-cov`, as far as it is known."""
        where = self.source if self.line is None else f"{self.source}:{self.line}"
        return ": ".join(part for part in (where, self.path) if part)

    def error(self, message: str) -> ConfigError:
        """A `ConfigError` that begins with the place."""
        return ConfigError(f"{self.place}: {message}" if self.place else message)

    def mapping(self, what: str) -> dict[str, Located]:
        """The members by key. Raises `ConfigError` if this is no mapping."""
        if not isinstance(self.value, dict):
            raise self.error(f"{what} has to be a mapping (`key: value`), got {shown(self)}")
        return self.value

    def sequence(self, what: str) -> list[Located]:
        """The items. Raises `ConfigError` if this is no list."""
        if not isinstance(self.value, list):
            raise self.error(f"{what} has to be a list, got {shown(self)}")
        return self.value

    def plain(self) -> Any:
        """The value without places: what `yaml.safe_load` gives."""
        if isinstance(self.value, dict):
            return {key: member.plain() for key, member in self.value.items()}
        return [item.plain() for item in self.value] if isinstance(self.value, list) else self.value

    def find(self, location: tuple[int | str, ...]) -> Located:
        """The member at this path, or the deepest one that exists on the way to it."""
        here = self
        for step in location:
            inside = here.value
            known = (
                range(len(inside)) if isinstance(inside, list) else inside if isinstance(inside, dict) else ()
            )
            if step not in known:
                break
            here = inside[step]
        return here


def shown(node: Located) -> str:
    """A short description of a value for a message."""
    if isinstance(node.value, dict):
        return f"a mapping with {', '.join(map(repr, node.value)) or 'nothing in it'}"
    if isinstance(node.value, list):
        return f"a list of {len(node.value)}"
    return "nothing" if node.value is None else repr(node.value)


def locate(data: Any, source: str = "", path: str = "") -> Located:
    """Plain data (as `yaml.safe_load` gives it) as a document without line numbers."""
    if isinstance(data, Mapping):
        members = {str(key): locate(value, source, _member(path, str(key))) for key, value in data.items()}
        return Located(members, source, None, path)
    if isinstance(data, (list, tuple)):
        items = [locate(value, source, f"{path}[{i}]") for i, value in enumerate(data)]
        return Located(items, source, None, path)
    return Located(data, source, None, path)


def read_document(path: str | Path) -> Located:
    """Read a YAML file. Raises `DataError` if it cannot be read, `ConfigError` (with line) if it is malformed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"cannot read {path}: {reason}; give the path of a YAML file") from error
    return parse_document(text, source=Path(path).name)


def parse_document(text: str, source: str = "") -> Located:
    """Parse YAML by the safe loader. Raises `ConfigError` with the line of what is malformed or given twice."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        return Located(None, source, 1) if root is None else _walk(root, loader, source, "", ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        problem = " ".join(str(error.problem or error.context or error).split())
        raise Located(None, source, line).error(f"malformed YAML: {problem}") from error
    except (
        yaml.YAMLError,
        ValueError,
    ) as error:  # ValueError: a date or number that is none, such as 2024-13-45
        raise Located(None, source).error(f"malformed YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise Located(None, source).error("malformed YAML: nested too deeply") from error
    finally:
        loader.dispose()


def _walk(
    node: yaml.Node, loader: yaml.SafeLoader, source: str, path: str, above: tuple[yaml.Node, ...]
) -> Located:
    line = node.start_mark.line + 1
    if node in above:
        raise Located(None, source, line, path).error("an alias refers to what contains it")
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        items = [_walk(item, loader, source, f"{path}[{i}]", above) for i, item in enumerate(node.value)]
        return Located(items, source, line, path)
    if not isinstance(node, yaml.MappingNode):
        return Located(loader.construct_object(node), source, line, path)
    loader.flatten_mapping(node)
    members: dict[str, Located] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise Located(None, source, key_node.start_mark.line + 1, path).error(
                "a key has to be a plain word"
            )
        key = str(key_node.value)
        member = _walk(value_node, loader, source, _member(path, key), above)
        # A key stands where it is written; its value may begin on a later line.
        member = Located(member.value, source, key_node.start_mark.line + 1, member.path)
        if key in members:
            raise member.error("this key is given twice; keep one")
        members[key] = member
    return Located(members, source, line, path)


def _member(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
