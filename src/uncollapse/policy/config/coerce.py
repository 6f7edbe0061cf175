"""A value from a document as the type that an option declares, or an error that names the place."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from uncollapse.errors import ConfigError, UnknownName
from uncollapse.policy.config.document import Located, shown

_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def coerce(node: Located, hint: Any) -> Any:
    """The value as `hint`: float, int, bool, str, None, Literal, a union of them, tuple[X, ...],
    frozenset[X] or Mapping[str, X].

    A whole number is accepted where a float is declared, and so is text that reads as one, since YAML 1.1 takes
    `1e-4` for text. Nothing else is converted. Raises `ConfigError` with the place of the value.
    """
    origin = get_origin(hint)
    if origin is Literal:
        choices = get_args(hint)
        if node.value not in choices or isinstance(node.value, bool):
            raise node.error(str(UnknownName("value", str(node.value), map(str, choices))))
        return node.value
    if origin in (Union, types.UnionType):
        return _one_of(node, get_args(hint))
    if origin in (tuple, frozenset):
        item_type, *rest = get_args(hint)
        if rest not in ([], [Ellipsis]):
            raise node.error("this option cannot be given in YAML; set it from Python")
        return origin(coerce(item, item_type) for item in node.sequence("this"))
    if origin is Mapping:
        _, value_type = get_args(hint)
        return {key: coerce(value, value_type) for key, value in node.mapping("this").items()}
    if hint not in _WORDS:
        raise node.error("this option cannot be given in YAML; set it from Python")
    return _scalar(node, hint)


def _one_of(node: Located, options: tuple[Any, ...]) -> Any:
    if node.value is None and type(None) in options:
        return None
    real = [option for option in options if option is not type(None)]
    for option in real[:-1]:
        try:
            return coerce(node, option)
        except ConfigError:  # the last alternative names what was expected
            continue
    return coerce(node, real[-1])


def _scalar(node: Located, hint: type) -> Any:
    value = node.value
    if hint is float:
        number = _as_float(value)
        if number is None or math.isnan(number):
            raise node.error(f"expected a number, got {shown(node)}")
        return number
    if type(value) is hint:
        return value
    raise node.error(f"expected {_WORDS[hint]}, got {shown(node)}")


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
