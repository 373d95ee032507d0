"""Which errors functions raise, found by following calls until nothing changes."""

import ast
import builtins
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from tests.raising.body import Body, Call
from tests.raising.names import Class, Function, Program, names_in
from tests.raising.types import Scope, Types
from tests.raising.values import FIXED

# Pattern of a caller, pattern of what it calls, error that this call cannot raise.
Impossible = tuple[str, str, str]
# An error, and the parameters whose values it is about; none where it does not depend on what a caller passes.
Fact = tuple[str, frozenset]
# The lines that lead to a `raise`.
Way = tuple[str, ...]
# A function, the class of its `self`, the arguments that its caller fixes, and what a `with` block throws into it.
Key = tuple[Function, Class | None, frozenset, frozenset]


class Errors:
    """The errors of every function, found by following calls until nothing changes.

    Args:
        program: The program.
        impossible: Calls that cannot raise an error although the source of what is called looks like it.
    """

    def __init__(self, program: Program, *, impossible: Iterable[Impossible] = ()):
        self.program, self.types = program, Types(program)
        self._bodies: dict[tuple[Function, Class | None], Body] = {}
        self.impossible = tuple(impossible)
        self.met: set[Impossible] = set()
        self._excluded: dict[tuple[str, str], list[Impossible]] = {}
        self.found: dict[Key, dict[Fact, Way]] = {}
        self._callers: dict[Key, set[Key]] = {}
        self._waiting: list[Key] = []
        self._current: Key | None = None
        self._ancestors: dict[str, set[str]] = {}

    def of(self, function: Function, cls: Class | None = None) -> dict[str, Way]:
        """Names of the errors of a public function to the calls that lead to where each is raised."""
        key = (function, cls, frozenset(), frozenset())
        self._ask(key)
        while self._waiting:
            self._current = self._waiting.pop()
            function_, cls_, constants, thrown = self._current
            body = self._body(function_, cls_)
            new, _ = self._run(body.scope, body.steps, dict(constants), [], dict.fromkeys(thrown, ()))
            if new.keys() != self.found[self._current].keys():
                self.found[self._current] = new
                self._waiting += self._callers[self._current]
        self._current = None
        found: dict[str, Way] = {}
        for (name, _), way in self.found[key].items():
            found.setdefault(name, way)
        return found

    def _ask(self, key: Key) -> dict[Fact, Way]:
        if key not in self.found:
            self.found[key] = {}
            self._callers[key] = set()
            self._waiting.append(key)
        if self._current is not None:
            self._callers[key].add(self._current)
        return self.found[key]

    def _body(self, function: Function, cls: Class | None) -> Body:
        if (function, cls) not in self._bodies:
            self._bodies[function, cls] = Body(self.types.scope(function, cls))
        return self._bodies[function, cls]

    def ancestors(self, name: str) -> set[str]:
        """An exception class and its bases, by name."""
        if name not in self._ancestors:
            found = {name}
            own = [each for each in self.program.classes if each.name == name]
            if own:
                for base in own[0].node.bases:
                    found |= self.ancestors(ast.unparse(base))
            elif isinstance(getattr(builtins, name, None), type):
                found |= {each.__name__ for each in getattr(builtins, name).__mro__}
            self._ancestors[name] = found
        return self._ancestors[name]

    def is_caught(self, name: str, kinds: Iterable[str] | None) -> bool:
        """Whether an `except` of these classes takes an error."""
        return kinds is None or bool(self.ancestors(name) & set(kinds))

    def _run(
        self, scope: Scope, block: list, constants: Mapping[str, Any], caught: list[dict], thrown: dict
    ) -> tuple[dict[Fact, Way], bool]:
        found: dict[Fact, Way] = {}

        def add(more: Mapping[Fact, Way]) -> None:
            for fact, way in more.items():
                found.setdefault(fact, way)

        for step in block:
            kind = step[0]
            if kind == "stop":
                return found, True
            if kind == "raise":
                add({step[1]: (place(scope, step[2]),)})
            elif kind == "again":
                errors = caught[-step[1]] if len(caught) >= step[1] else {}
                again = {
                    fact for fact in errors if all(self.is_caught(fact[0], kinds) is yes for kinds, yes in step[2])
                }
                add({fact: errors[fact] for fact in again})
            elif kind == "yield":
                add(thrown)
            elif kind == "call":
                add(self._of_call(scope, step[1], constants))
            elif kind == "part":
                add(self._run(scope, step[1], constants, caught, thrown)[0])
            elif kind == "if":
                more, stopped = self._of_if(scope, step, constants, caught, thrown)
                add(more)
                if stopped:
                    return found, True
            elif kind == "try":
                add(self._of_try(scope, step, constants, caught, thrown))
            elif kind == "with":
                inner, stopped = self._run(scope, step[2], constants, caught, thrown)
                add(self._of_with(scope, step[1], constants, inner))
                if stopped:
                    return found, True
        return found, False

    def _of_if(
        self, scope: Scope, step: tuple, constants: Mapping[str, Any], caught: list, thrown: dict
    ) -> tuple[dict, bool]:
        _, test, body, otherwise = step
        known = truth(test, constants, scope)
        if known == FIXED:
            known = False if ends_in_raise(body) else True if ends_in_raise(otherwise) else None
        first, first_stops = ({}, True) if known is False else self._run(scope, body, constants, caught, thrown)
        second, second_stops = ({}, True) if known is True else self._run(scope, otherwise, constants, caught, thrown)
        return {**second, **first}, first_stops and second_stops

    def _of_try(self, scope: Scope, step: tuple, constants: Mapping[str, Any], caught: list, thrown: dict) -> dict:
        _, body, handlers, otherwise = step
        left, _ = self._run(scope, body, constants, caught, thrown)
        found: dict[Fact, Way] = {}
        for kinds, handler in handlers:
            taken = {fact: way for fact, way in left.items() if self.is_caught(fact[0], kinds)}
            left = {fact: way for fact, way in left.items() if fact not in taken}
            found.update(self._run(scope, handler, constants, [*caught, taken], thrown)[0])
        found.update(self._run(scope, otherwise, constants, caught, thrown)[0])
        return {**found, **left}

    def _of_with(self, scope: Scope, call: Call, constants: Mapping[str, Any], inner: dict) -> dict:
        function, cls = call.target
        given = filled(call.given, constants)
        out = self._ask((function, cls, frozenset(given.items()), frozenset(inner)))
        own = self._kept([fact for fact in out if out[fact]], call)
        through = {fact: inner[fact] for fact in out if not out[fact] and fact in inner}
        return self._possible(scope.function, function, {fact: out[old] for fact, old in own.items()}) | through

    def _of_call(self, scope: Scope, call: Call, constants: Mapping[str, Any]) -> dict:
        function, cls = call.target
        given = filled(call.given, constants)
        found = self._ask((function, cls, frozenset(given.items()), frozenset()))
        way = place(scope, call.line)
        kept = {fact: (way, *found[old])[:12] for fact, old in self._kept(found, call).items()}
        return self._possible(scope.function, function, kept)

    @staticmethod
    def _kept(found: Iterable[Fact], call: Call) -> dict[Fact, Fact]:
        """The errors that a call hands on, each as one of the caller: those about a value that the library chose are not."""
        kept: dict[Fact, Fact] = {}
        for name, about in found:
            mine = frozenset().union(*(call.sources.get(each, ()) for each in about)) if about else frozenset()
            if bool(mine) == bool(about) and (call.is_asked or name != "KeyError"):
                kept.setdefault((name, mine - {"*"}), (name, about))
        return kept

    def _possible(self, caller: Function, called: Function, found: dict) -> dict:
        places = caller.place, called.place
        if places not in self._excluded:
            fits = [row for row in self.impossible if fnmatchcase(places[0], row[0]) and fnmatchcase(places[1], row[1])]
            self._excluded[places] = fits
        rows = {fact: row for fact in found for row in self._excluded[places] if fnmatchcase(fact[0], row[2])}
        self.met |= set(rows.values())
        return {fact: way for fact, way in found.items() if fact not in rows}


def filled(arguments: Mapping[str, tuple], constants: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a call that are known, given those of the function that it stands in."""
    known = {name: value for name, (kind, value) in arguments.items() if kind == "value"}
    passed = {
        name: constants[value] for name, (kind, value) in arguments.items() if kind == "name" and value in constants
    }
    return {**known, **passed}


def place(scope: Scope, line: int) -> str:
    """A line of a source file, as an editor opens it."""
    parts = scope.module.path.parts
    return f"{'/'.join(parts[parts.index('eigenpeft') + 1 :])}:{line}"


def ends_in_raise(block: list) -> bool:
    """Whether a branch does nothing but raise."""
    return any(step[0] in {"raise", "again"} for step in block)


def truth(test: ast.expr, constants: Mapping[str, Any], scope: Scope) -> Any:
    """True, False, FIXED (decided by the library, unknown here) or None (depends on what the user passes)."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = truth(test.operand, constants, scope)
        return not inner if isinstance(inner, bool) else inner
    if isinstance(test, ast.BoolOp):
        values = [truth(each, constants, scope) for each in test.values]
        ends = isinstance(test.op, ast.Or)
        if ends in values:
            return ends
        open_values = [each for each in values if not isinstance(each, bool)]
        if not open_values:
            return not ends
        return None if None in open_values else FIXED
    names = names_in(test)
    known = {name for name in names if name in constants and name not in scope.rebound}
    if not known:
        return None
    others = names - known
    if any(name in scope.bindings for name in others):
        return None
    if FIXED in [constants[name] for name in known] or any(not hasattr(builtins, name) for name in others):
        return FIXED
    try:
        values = {name: constants[name] for name in known}
        return bool(eval(compile(ast.Expression(test), "test", "eval"), {}, values))  # noqa: S307
    except Exception:
        return FIXED
