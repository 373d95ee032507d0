"""Where the values of a function's calls come from: from its own caller, or from the library."""

import ast
import re
from functools import cached_property
from typing import Any

from tests.raising.names import Function, dotted, names_in, walk
from tests.raising.types import Scope

FIXED = "<fixed by the library>"  # a value that no caller of the public function chooses, such as a module's constant
PLAIN = re.compile(r"(?:(?:int|float|str|bool|None|Literal\[[^]]*\])(?: \| )?)+")  # annotations of numbers and texts


class Values:
    """The values in one function.

    Args:
        scope: Its names.
    """

    def __init__(self, scope: Scope):
        self.scope = scope

    @cached_property
    def plain(self) -> set[str]:
        """Parameters that are numbers or texts."""
        arguments = self.scope.function.node.args
        every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        return {
            each.arg for each in every if each.annotation is not None and PLAIN.fullmatch(ast.unparse(each.annotation))
        }

    def made_of(self, node: ast.expr, *, depth: int = 4) -> set[str]:
        """The numbers and texts among the parameters that a value is made of."""
        found = set()
        for name in names_in(node):
            if name in self.plain:
                found.add(name)
            elif depth and name in self.scope.bindings and name not in self.scope.parameters:
                for how, value in self.scope.bindings[name]:
                    if how == "value" and not isinstance(value, tuple):
                        found |= self.made_of(value, depth=depth - 1)
        return found

    @cached_property
    def looked_up(self) -> set[str]:
        """Names that are held against a table before: `if name not in table: raise ...`, `[... if name not in table]`."""
        found = set()
        for node in self.scope.function.nodes:
            test = node.test if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise) else None
            if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.NotIn) and isinstance(test.left, ast.Name):
                found.add(test.left.id)
            for test in node.ifs if isinstance(node, ast.comprehension) else ():
                if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.NotIn):
                    found |= {dotted(test.left), dotted(node.iter)}
        return found

    def asked(self, node: ast.expr, *, depth: int = 6) -> set[str]:
        """The parameters from which the name, or names, of an expression come as they were given."""
        if isinstance(node, ast.Call):
            if dotted(node.func) in {"sorted", "list", "tuple", "set", "dict.fromkeys"}:
                node = node.args[0] if node.args else node
            elif isinstance(node.func, ast.Attribute) and node.func.attr in {"items", "keys"}:
                node = node.func.value
        parts = [node.body, node.orelse] if isinstance(node, ast.IfExp) else []
        parts += node.elts if isinstance(node, ast.List | ast.Tuple) else []
        found = {name for part in parts for name in self.asked(part, depth=depth)}
        if not isinstance(node, ast.Name) or depth == 0 or node.id in self.looked_up:
            return found
        for how, value in self.scope.bindings.get(node.id, ()):
            if how in {"annotation", "many"}:
                text = "" if value is None else ast.unparse(value)
                if node.id in self.scope.parameters and "str" in text and "Path" not in text:
                    found.add(node.id)
            else:
                found |= self.asked(value[0] if isinstance(value, tuple) else value, depth=depth - 1)
        return found

    def constant(self, node: ast.expr) -> tuple[str, Any] | None:
        """("value", what the library passes), ("name", parameter that is passed on), or None for what depends on more."""
        names = names_in(node)
        if isinstance(node, ast.Name) and node.id in self.scope.parameters and node.id not in self.scope.rebound:
            return ("name", node.id)
        if any(name in self.scope.bindings for name in names):
            return None
        if any(isinstance(each, ast.Call | ast.Attribute | ast.Lambda) for each in walk(node)):
            return None
        if not names:
            try:
                value = ast.literal_eval(node)
                hash(value)
            except (ValueError, TypeError):
                return ("value", FIXED)
            return ("value", value)
        found = self.scope.program.find(self.scope.module, node.id) if isinstance(node, ast.Name) else None
        if isinstance(found, tuple) and found[0] == "value" and isinstance(found[2], ast.Constant):
            return ("value", found[2].value)
        if isinstance(found, Function):
            return None
        return ("value", FIXED)
