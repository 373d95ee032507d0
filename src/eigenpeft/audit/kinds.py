"""The check that the values of a report that was read back have the kinds that its fields name."""

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def wrong_kind(value: Any, kind: Any, *, where: str = "") -> str | None:
    """The first value of another kind than its annotation, named; None where all fit.

    Knows what reports are made of: numbers, text, literals, tuples, mappings, optional values and dataclasses.

    Args:
        value: What was read.
        kind: Its annotation.
        where: Name of the value, for the message.

    Examples:
        >>> wrong_kind((1.0, "x"), tuple[float, ...], where="real")
        "real[1] is 'x', not float"
        >>> wrong_kind(None, float | None) is None
        True
    """
    return next((fault for fault in _faults(value, kind, where)), None)


def _faults(value: Any, kind: Any, where: str) -> Iterator[str]:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        fits = any(wrong_kind(value, one) is None for one in inner)
    elif origin is typing.Literal:
        fits = value in inner
    elif origin is tuple:
        kinds = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is Ellipsis else inner
        fits = isinstance(value, tuple) and len(kinds) == len(value)
        for i in range(len(value) if fits else 0):
            yield from _faults(value[i], kinds[i], f"{where}[{i}]")
    elif origin in (dict, Mapping):
        fits = isinstance(value, Mapping)
        for key in value if fits else ():
            yield from _faults(key, inner[0], f"a key of {where}")
            yield from _faults(value[key], inner[1], f"{where}[{key!r:.40}]")
    elif is_dataclass(kind) and isinstance(kind, type):
        fits = isinstance(value, kind)
        hints = typing.get_type_hints(kind)
        for field in fields(kind) if fits else ():
            yield from _faults(getattr(value, field.name), hints[field.name], f"{where}.{field.name}".lstrip("."))
    else:
        kinds: Any = (int, float) if kind is float else kind  # JSON writes 1.0 as 1
        fits = kind is Any or (isinstance(value, kinds) and not (isinstance(value, bool) and kind in (int, float)))
    if not fits:
        yield f"{where} is {value!r:.60}, not {kind.__name__ if isinstance(kind, type) and origin is None else kind}"
