"""The body of a function as nested lists of what matters to errors."""

import ast
import builtins
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

from tests.raising.names import Class, Function, dotted, names_in
from tests.raising.types import Scope
from tests.raising.values import Values

_ITERATING = {"dict", "enumerate", "iter", "list", "map", "next", "set", "sorted", "tuple", "zip"}
Target = tuple[Function, Class | None]  # a function and the class of its `self`


class Call(NamedTuple):
    """A call of a function of ours.

    Attributes:
        target: What is called.
        line: Line of the call.
        given: Parameter to ("value", what the library fixes) or ("name", parameter of the caller that is passed on).
        is_asked: Whether some argument is a name, or names, that the caller was given.
        sources: Parameter to those of the caller's parameters that its value is made of; "*" is any.
    """

    target: Target
    line: int
    given: dict[str, tuple[str, Any]]
    is_asked: bool
    sources: dict[str, frozenset[str]]


class Body:
    """What a function runs, as ("raise", fact, line), ("again", depth, filters), ("yield",), ("call", Call),
    ("if", test, block, block), ("try", block, handlers, block), ("with", Call, block), ("part", block) and ("stop",).

    Args:
        scope: Its names.
    """

    def __init__(self, scope: Scope):
        self.scope, self.values = scope, Values(scope)
        self._handlers: list[str | None] = []
        self._tests: list[set[str]] = []
        self._filters: list[tuple[str, tuple[str, ...], bool]] = []

    @cached_property
    def steps(self) -> list:
        """The whole body."""
        return self.block(self.scope.function.node.body)

    def block(self, statements: Iterable[ast.stmt]) -> list:
        return [step for statement in statements for step in self.statement(statement)]

    def statement(self, node: ast.stmt) -> list:
        if isinstance(node, ast.Raise):
            return [*self._within(node), *self._raised(node), ("stop",)]
        if isinstance(node, ast.Return):
            return [*(self.calls(node.value) if node.value else []), ("stop",)]
        if isinstance(node, ast.Continue | ast.Break):
            return [("stop",)]
        if isinstance(node, ast.If):
            self._tests.append(names_in(node.test))
            branches = self._branches(node)
            self._tests.pop()
            return [*self.calls(node.test), ("if", node.test, *branches)]
        if isinstance(node, ast.For | ast.AsyncFor):
            return [*self.iterated(node.iter), ("part", self.block(node.body)), ("part", self.block(node.orelse))]
        if isinstance(node, ast.While):
            return [*self.calls(node.test), ("part", self.block(node.body)), ("part", self.block(node.orelse))]
        if isinstance(node, ast.Try):
            return [self._tried(node), *self.block(node.finalbody)]
        if isinstance(node, ast.With | ast.AsyncWith):
            return self._with(list(node.items), node.body)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return [("part", self.block(node.body))]
        if isinstance(node, ast.Match):
            return [*self.calls(node.subject), *(("part", self.block(case.body)) for case in node.cases)]
        if isinstance(node, ast.ClassDef):
            return []
        return self._within(node)

    def _within(self, node: ast.AST) -> list:
        return [step for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr) for step in self.calls(each)]

    def _branches(self, node: ast.If) -> tuple[list, list]:
        test, is_kind = node.test, True
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test, is_kind = test.operand, False
        if isinstance(test, ast.Call) and dotted(test.func) == "isinstance" and isinstance(test.args[0], ast.Name):
            kinds = tuple(self.scope.named(test.args[1]))
            self._filters.append((test.args[0].id, kinds, is_kind))
            body = self.block(node.body)
            self._filters[-1] = (test.args[0].id, kinds, not is_kind)
            otherwise = self.block(node.orelse)
            self._filters.pop()
            return body, otherwise
        return self.block(node.body), self.block(node.orelse)

    def _tried(self, node: ast.Try) -> tuple:
        body = self.block(node.body)
        handlers = []
        for handler in node.handlers:
            kinds = None if handler.type is None else tuple(self.scope.named(handler.type))
            self._handlers.append(handler.name)
            handlers.append((kinds, self.block(handler.body)))
            self._handlers.pop()
        return ("try", body, handlers, self.block(node.orelse))

    def _with(self, items: list[ast.withitem], body: list[ast.stmt]) -> list:
        if not items:
            return self.block(body)
        node, inner = items[0].context_expr, self._with(items[1:], body)
        if isinstance(node, ast.Call):
            if dotted(node.func) in {"suppress", "contextlib.suppress"}:
                kinds = tuple(name for each in node.args for name in self.scope.named(each))
                return [("try", inner, [(kinds, [])], [])]
            contexts = [each for each in self.scope.targets(node.func) if each[0].is_context]
            if contexts:
                entered = [("with", self._call_of(each, node), inner) for each in contexts]
                return [*self._within(node), *entered]
        entering = [
            _bare(target, node.lineno)
            for kind in self.scope.type_of(node)
            if kind[0] == "instance"
            for name in ("__enter__", "__exit__")
            for target in self.scope.program.overrides(kind[1], name)
        ]
        return [*self.calls(node), *entering, *inner]

    def _raised(self, node: ast.Raise) -> list:
        what = node.exc
        if isinstance(what, ast.Call) and isinstance(what.func, ast.Call) and dotted(what.func.func) == "type":
            what = what.func.args[0]
        if what is None or (isinstance(what, ast.Name) and what.id in self._handlers):
            depth = 1 if what is None else [*reversed(self._handlers)].index(what.id) + 1
            name = self._handlers[-depth] if self._handlers else None
            filters = [each[1:] for each in self._filters if each[0] == name]
            return [("again", depth, filters)]
        called = what.func if isinstance(what, ast.Call) else what
        if isinstance(called, ast.Name) and called.id not in self.scope.bindings:
            found = self.scope.program.find(self.scope.module, called.id)
            if isinstance(found, Class) or (found is None and hasattr(builtins, called.id)):
                return [("raise", (called.id, self._about(called.id)), node.lineno)]
        kinds = [kind[1].name for kind in self.scope.type_of(what) if kind[0] in {"instance", "class"}]
        return [("raise", (name, self._about(name)), node.lineno) for name in kinds]

    def _about(self, error: str) -> frozenset[str]:
        """The plain values among the parameters that a ValueError is about; whoever passes them knows whether they are right."""
        named = set().union(*self._tests) if error in {"KeyError", "ValueError"} else set()
        return frozenset(named & (self.values.plain if error == "ValueError" else self.scope.parameters))

    def iterated(self, node: ast.expr) -> list:
        steps = self.calls(node)
        for kind in self.scope.type_of(node):
            if kind[0] == "instance":
                steps += [_bare(target, node.lineno) for target in self.scope.program.overrides(kind[1], "__iter__")]
        return steps

    def calls(self, node: ast.expr) -> list:
        """The calls in an expression."""
        if isinstance(node, ast.IfExp):
            return [*self.calls(node.test), ("if", node.test, self.calls(node.body), self.calls(node.orelse))]
        if isinstance(node, ast.BoolOp):
            first, *rest = node.values
            later = [step for each in rest for step in self.calls(each)]
            branches = (later, []) if isinstance(node.op, ast.And) else ([], later)
            return [*self.calls(first), *([("if", first, *branches)] if later else [])]
        if isinstance(node, ast.Lambda):
            return [("part", self.calls(node.body))]
        if isinstance(node, ast.Yield):
            return [*(self.calls(node.value) if node.value else []), ("yield",)]
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            steps = []
            for each in node.generators:
                steps += [*self.iterated(each.iter), *(step for test in each.ifs for step in self.calls(test))]
            parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            return [*steps, *(step for part in parts for step in self.calls(part))]
        steps = self._within(node)
        if isinstance(node, ast.Call):
            steps += [step for each in node.keywords for step in self.calls(each.value)]
            steps += self._call(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            steps += self._property(node)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            steps += self._dunder(node.value, "__getitem__", key=node.slice)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[-1], ast.In | ast.NotIn):
            steps += self._dunder(node.comparators[-1], "__contains__")
        return steps

    def _call_of(self, target: Target, node: ast.Call) -> Call:
        values = (*node.args, *(each.value for each in node.keywords))
        is_asked = any(self.values.asked(value) for value in values)
        return Call(target, node.lineno, self.fixed(target[0], node), is_asked, self._sources(target[0], node))

    def _dunder(self, node: ast.expr, name: str, *, key: ast.expr | None = None) -> list:
        given = frozenset() if key is None else frozenset(self.values.asked(key))
        kinds = [kind[1] for kind in self.scope.type_of(node) if kind[0] == "instance"]
        targets = [target for kind in kinds for target in self.scope.program.overrides(kind, name)]
        return [
            ("call", Call(target, node.lineno, {}, bool(given), dict.fromkeys(target[0].parameters[:1], given)))
            for target in targets
        ]

    def _property(self, node: ast.Attribute) -> list:
        steps = []
        for kind in self.scope.type_of(node.value):
            function = self.scope.program.method(kind[1], node.attr) if kind[0] == "instance" else None
            if function is not None and function.is_property:
                own = isinstance(node.value, ast.Name) and node.value.id == self.scope.first
                targets = [(function, kind[1])] if own else self.scope.program.overrides(kind[1], node.attr)
                steps += [_bare(target, node.lineno) for target in targets]
        return steps

    def _call(self, node: ast.Call) -> list:
        steps: list = []
        is_lookup = isinstance(node.func, ast.Attribute) and node.func.attr == "get"
        for value in () if is_lookup else (*node.args, *(each.value for each in node.keywords)):
            if isinstance(value, ast.Name | ast.Attribute):
                passed = [
                    kind for kind in self.scope.type_of(value) if kind[0] == "function" and not kind[1].is_property
                ]
                steps += [_bare(kind[1:], node.lineno) for kind in passed]
        targets = self.scope.targets(node.func)
        steps += [("call", self._call_of(target, node)) for target in targets]
        if isinstance(node.func, ast.Attribute) and not targets and node.func.attr in {"items", "values", "get"}:
            steps.append(("try", self._dunder(node.func.value, "__getitem__"), [(("KeyError",), [])], []))
        if isinstance(node.func, ast.Name) and node.func.id in _ITERATING:
            steps += [step for each in node.args for step in self._dunder(each, "__iter__")]
        return steps

    def _given(self, function: Function, node: ast.Call) -> tuple[dict[str, ast.expr], bool]:
        """Parameter to the expression that a call passes, and whether `*` or `**` may pass more."""
        given: dict[str, ast.expr] = {}
        is_open = any(each.arg is None for each in node.keywords)
        for place, value in enumerate(node.args):
            if isinstance(value, ast.Starred):
                is_open = True
                break
            if place < len(function.parameters):
                given[function.parameters[place]] = value
        given.update({each.arg: each.value for each in node.keywords if each.arg is not None})
        return given, is_open

    def _sources(self, function: Function, node: ast.Call) -> dict[str, frozenset[str]]:
        """Parameter of what is called to the plain parameters here that its value is made of."""
        given, is_open = self._given(function, node)
        found = {
            name: frozenset(self.values.made_of(value) | self.values.asked(value)) for name, value in given.items()
        }
        if is_open:
            found |= {name: frozenset({"*"}) for name in function.keywords - given.keys()}
        return found

    def fixed(self, function: Function, node: ast.Call) -> dict[str, Any]:
        """Parameter to ("value", constant) or ("name", name of ours), for those that a call fixes."""
        given, is_open = self._given(function, node)
        found = {}
        for name in function.decisive:
            if name in given:
                value = self.values.constant(given[name])
            elif name in function.defaults and not is_open:
                value = Values(self.scope.types.outer(function.module)).constant(function.defaults[name])
            else:
                value = None
            if value is not None:
                found[name] = value
        return found


def _bare(target: Target, line: int) -> tuple[str, Call]:
    """A call whose arguments are the library's own, or none."""
    return "call", Call(target, line, {}, False, {})
