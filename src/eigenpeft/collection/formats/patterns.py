"""Patterns of adapter configs (`rank_pattern`, `target_modules`): PEFT's rules, in time that no pattern can stretch."""

import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

import regex

Value = TypeVar("Value")

MAX_LENGTH = 1_000
MAX_PATTERNS = 200_000
# Processor seconds that all regular expressions of one config may take together. PEFT's own patterns are plain names, which
# take none; a few hundred expressions with ".*" on a few hundred modules take well under one.
TIME_LIMIT = 10.0
_MAX_REPEATS = 10_000
_COUNTS = re.compile(r"(?<=[{,])0*([1-9][0-9]*)(?=[,}])")
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+", re.ASCII)


class PatternTable(Generic[Value]):
    """Values by pattern, by the rule of PEFT's `rank_pattern` and `alpha_pattern`.

    A pattern is a regular expression for the whole name of a module or for its end after a dot; the first one in the file's
    order counts, not the longest. Plain names, all that PEFT itself writes, are looked up rather than matched. Anything else
    is matched by a library that stops at a time limit: expressions such as "(a+)+" take 2^n steps in the standard one.

    Args:
        patterns: Pattern to value.

    Raises:
        ValueError: If a pattern is not a regular expression, or too long; or there are too many. The message is a clause to put
            behind "has".

    Example:
        >>> table = PatternTable({"^model.layers.0.q_proj": 2, "q_proj": 4})
        >>> table.value("model.layers.0.q_proj", default=8), table.value("model.layers.1.q_proj", default=8)
        (2, 4)
    """

    def __init__(self, patterns: Mapping[str, Value]):
        if len(patterns) > MAX_PATTERNS:
            raise ValueError(f"{len(patterns)} patterns, more than the {MAX_PATTERNS} that are read")
        self._patterns, self._values = list(patterns), list(patterns.values())
        self._names = {pattern: place for place, pattern in enumerate(patterns)}
        # Of plain names, by their length and the places of dots that stand for any character: the name to its place.
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._expressions: list[tuple[int, regex.Pattern[str]]] = []
        self._clock = _Clock()
        for place, pattern in enumerate(patterns):
            if len(pattern) > MAX_LENGTH:
                raise ValueError(f"a pattern of {len(pattern)} characters, more than the {MAX_LENGTH} that are read")
            if _PLAIN.fullmatch(pattern):
                self._add_plain(pattern, place)
            else:
                # As PEFT puts it together.
                self._expressions.append((place, _compiled(pattern, whole=rf"(.*\.)?({pattern})$")))

    def value(self, module: str, *, default: Value) -> Value:
        """Value of the first pattern that fits a module.

        Args:
            module: Name of the module in the adapter's own model.
            default: Value when none fits.

        Raises:
            ValueError: If the expressions take longer than the time limit.
        """
        place = self._first_plain(module)
        for number, expression in self._expressions:
            if place is not None and number > place:
                break
            if self._clock.matches(expression, module, shown=self._patterns[number]):
                return self._values[number]
        if place is None:  # as PEFT, which asks for the name itself when no pattern fits
            place = self._names.get(module)
        return default if place is None else self._values[place]

    def _add_plain(self, pattern: str, place: int) -> None:
        name = pattern.removeprefix("^").replace("\\.", "\0")
        wild = tuple(i for i, char in enumerate(name) if char == ".")
        # A circumflex is only true at the start of the whole name.
        key = ("^" if pattern.startswith("^") else "") + name.replace("\0", ".")
        self._plain.setdefault(len(name), {}).setdefault(wild, {}).setdefault(key, place)

    def _first_plain(self, module: str) -> int | None:
        module = module.removesuffix("\n")  # where "$" fits too
        starts = [0, *(i + 1 for i, char in enumerate(module) if char == ".")]
        found = []
        for start in starts:
            end = module[start:]
            for wild, names in self._plain.get(len(end), {}).items():
                masked = end
                if any(end[i] != "." for i in wild):
                    chars = list(end)
                    for i in wild:
                        chars[i] = "." if chars[i] != "\n" else "\n"
                    masked = "".join(chars)
                found += [names[key] for key in (masked, f"^{masked}" if start == 0 else "") if key in names]
        return min(found, default=None)


class _Clock:
    """Matches expressions until their time is up."""

    def __init__(self):
        self._seconds_left = TIME_LIMIT

    def matches(self, expression: regex.Pattern[str], name: str, *, shown: str) -> bool:
        try:
            before = time.process_time()
            fits = expression.match(name, timeout=max(self._seconds_left, 1e-3)) is not None
        except TimeoutError:
            self._seconds_left = 0.0
        else:
            self._seconds_left -= time.process_time() - before
            if self._seconds_left > 0:
                return fits
        raise ValueError(
            f"the pattern {shown[:80]!r}, which takes more than {TIME_LIMIT:.0f} seconds to be matched against module names "
            "such as " + repr(name[:80]) + "; write plain names instead"
        )


def _compiled(pattern: str, *, whole: str) -> regex.Pattern[str]:
    # "((a{1000}){1000}){1000}" takes gigabytes when it is compiled.
    if math.prod(int(count) for count in _COUNTS.findall(pattern)) > _MAX_REPEATS:
        raise ValueError(f"{pattern[:80]!r}, whose counted repetitions make more than {_MAX_REPEATS} together")
    # Compiled by the standard library too, so that a pattern that PEFT rejects is rejected here too.
    try:
        re.compile(whole)
        return regex.compile(whole)
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"{pattern[:80]!r}, which is not a regular expression ({error})") from error


def is_plain(pattern: str) -> bool:
    """Whether a pattern is a plain name, which takes no time to match: letters, digits, "_", "-" and dots.

    Args:
        pattern: From a config.
    """
    return len(pattern) <= MAX_LENGTH and _PLAIN.fullmatch(pattern) is not None


def whole_matches(pattern: str, names: Iterable[str]) -> list[str]:
    r"""The names that a pattern fits as a whole, as PEFT reads a `target_modules` or `exclude_modules` that is one string.

    Args:
        pattern: A regular expression.
        names: Names of modules.

    Raises:
        ValueError: As `PatternTable`.

    Examples:
        >>> whole_matches(r".*\.(q|v)_proj", ["layers.0.q_proj", "layers.0.k_proj", "q_proj"])
        ['layers.0.q_proj']
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"a pattern of {len(pattern)} characters, more than the {MAX_LENGTH} that are read")
    expression, clock = _compiled(pattern, whole=rf"(?:{pattern})\Z"), _Clock()
    return [name for name in names if clock.matches(expression, name, shown=pattern)]


def pattern_value(patterns: Mapping[str, Value], module: str, *, default: Value) -> Value:
    """Value of the first pattern that fits a module; see `PatternTable`, which is faster for many modules.

    Args:
        patterns: Pattern to value.
        module: Name of the module in the adapter's own model.
        default: Value when none fits.

    Raises:
        ValueError: As `PatternTable`.
    """
    return PatternTable(patterns).value(module, default=default)
