"""What the names and expressions of a function stand for, as far as annotations and assignments tell."""

import ast
from collections.abc import Iterator
from typing import Any

from tests.raising.names import Class, Function, Module, Program, dotted

MAPPINGS = {"Mapping", "MutableMapping", "dict", "defaultdict", "Counter", "OrderedDict"}
SEQUENCES = {
    "Sequence", "Iterable", "Iterator", "Collection", "Generator", "Set", "list", "tuple", "set", "frozenset", "deque",
}  # fmt: skip
WRAPPERS = {"Annotated", "ClassVar", "Final", "Required", "NotRequired"}
NO_TYPE: frozenset = frozenset()
NOTHING = ast.parse("def nothing(): ...").body[0]

# A type is a frozenset of ("instance", Class), ("class", Class), ("function", Function, class of its self), ("module", Module),
# ("super", Class, class that asks), ("sequence", type), ("mapping", type, type) and ("tuple", types).


class Types:
    """Types of annotations, attributes and results, and the scopes of functions.

    Args:
        program: The program.
    """

    def __init__(self, program: Program):
        self.program = program
        self._scopes: dict[tuple[Function, Class | None], Scope] = {}
        self._outer: dict[Module, Scope] = {}
        self._attributes: dict[tuple[Class, str], frozenset] = {}

    def scope(self, function: Function, cls: Class | None) -> "Scope":
        """The scope of a function whose `self` is of a class."""
        if (function, cls) not in self._scopes:
            self._scopes[function, cls] = Scope(self, function, cls)
        return self._scopes[function, cls]

    def outer(self, module: Module) -> "Scope":
        """The scope of a module's own lines."""
        if module not in self._outer:
            self._outer[module] = Scope(self, Function(module, NOTHING), None)
        return self._outer[module]

    # ---- types: frozensets of ("instance", Class), ("class", Class), ("function", Function, Class | None), ("module", Module),
    # ("sequence", type), ("mapping", type, type), ("tuple", types)

    def annotated(self, module: Module, node: ast.expr | None, cls: Class | None = None) -> frozenset:
        """The type that an annotation names."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                node = ast.parse(node.value, mode="eval").body
            except SyntaxError:
                return NO_TYPE
        if isinstance(node, ast.BinOp):
            return self.annotated(module, node.left, cls) | self.annotated(module, node.right, cls)
        if isinstance(node, ast.Name):
            if node.id == "Self" and cls:
                return frozenset({("instance", cls)})
            found = self.program.find(module, node.id)
            if isinstance(found, Class):
                return frozenset({("instance", found)})
            if isinstance(found, tuple) and found[0] == "value" and found[2] is not None:
                return self.annotated(found[1], found[2], cls)
        if isinstance(node, ast.Subscript):
            return self._subscripted(module, node, cls)
        return NO_TYPE

    def _subscripted(self, module: Module, node: ast.Subscript, cls: Class | None) -> frozenset:
        name = ast.unparse(node.value).split(".")[-1]
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        types = [self.annotated(module, part, cls) for part in parts]
        if name in MAPPINGS and types:
            return frozenset({("mapping", types[0], types[-1])})
        if name == "tuple" and not (len(parts) == 2 and isinstance(parts[1], ast.Constant)):
            return frozenset({("tuple", tuple(types))})
        if name in SEQUENCES:
            return frozenset({("sequence", types[0])})
        if name in WRAPPERS:
            return types[0]
        if name == "type":
            return frozenset(("class", each[1]) for each in types[0] if each[0] == "instance")
        return self.annotated(module, node.value, cls)

    def element(self, kind: frozenset) -> frozenset:
        """The type of what iterating gives."""
        found: frozenset = NO_TYPE
        for each in kind:
            if each[0] in {"sequence", "mapping"}:
                found |= each[1]
            elif each[0] == "tuple":
                found = found.union(*each[1])
            elif each[0] == "instance" and (function := self.program.method(each[1], "__iter__")):
                found |= self.element(self.returned(function, each[1]))
        return found

    def returned(self, function: Function, cls: Class | None) -> frozenset:
        """The type of a call's result."""
        return self.annotated(function.module, function.node.returns, cls)

    def attribute(self, cls: Class, name: str) -> frozenset:
        """The type of an instance's attribute."""
        if (cls, name) not in self._attributes:
            self._attributes[cls, name] = NO_TYPE
            self._attributes[cls, name] = self._attribute(cls, name)
        return self._attributes[cls, name]

    def _attribute(self, cls: Class, name: str) -> frozenset:
        function = self.program.method(cls, name)
        if function is not None:
            return self.returned(function, cls) if function.is_property else frozenset({("function", function, cls)})
        for each in self.program.line(cls):
            if name in each.fields:
                return self.annotated(each.module, each.fields[name], cls)
        found: frozenset = NO_TYPE
        for each in self.program.line(cls):
            for function in each.methods.values():
                for value in self.scope(function, cls).assigned_to_self.get(name, ()):
                    found |= self.scope(function, cls).type_of(value)
        return found


class Scope:
    """The names of one function.

    Args:
        types: Types of the program.
        function: The function.
        cls: The class of its `self`; None for a function of a module.
    """

    def __init__(self, types: Types, function: Function, cls: Class | None):
        self.types, self.program, self.module = types, types.program, function.module
        self.function, self.cls = function, cls
        self.bindings: dict[str, list[tuple[str, Any]]] = {}
        self.assigned_to_self: dict[str, list[ast.expr]] = {}
        self._types: dict[ast.AST, frozenset] = {}
        self._names: dict[str, frozenset] = {}
        arguments = function.node.args
        plain = [*arguments.posonlyargs, *arguments.args]
        self.first = plain[0].arg if function.owner and plain and not function.is_static else None
        self._arguments(arguments)
        self.parameters = set(self.bindings)
        self.rebound: set[str] = set()
        self._bind()

    def _arguments(self, arguments: ast.arguments) -> None:
        for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            self.bindings.setdefault(each.arg, []).append(("annotation", each.annotation))
        if arguments.vararg:
            self.bindings.setdefault(arguments.vararg.arg, []).append(("many", arguments.vararg.annotation))
        if arguments.kwarg:
            self.bindings.setdefault(arguments.kwarg.arg, []).append(("table", arguments.kwarg.annotation))

    def _bind(self) -> None:
        for node in self.function.nodes[1:]:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._target(target, "value", node.value)
            elif isinstance(node, ast.AnnAssign):
                self._target(node.target, "annotation", node.annotation)
                if node.value is not None:
                    self._target(node.target, "value", node.value)
            elif isinstance(node, ast.NamedExpr | ast.AugAssign):
                self._target(node.target, "value", node.value)
            elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
                self._target(node.target, "element", node.iter)
            elif isinstance(node, ast.withitem) and node.optional_vars is not None:
                self._target(node.optional_vars, "entered", node.context_expr)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                self.rebound |= {each.arg for each in (*node.args.args, *node.args.kwonlyargs)}
                self._arguments(node.args)
                if not isinstance(node, ast.Lambda):
                    self.bindings.setdefault(node.name, []).append(("annotation", None))

    def _target(self, target: ast.expr, how: str, value: Any, path: tuple[int, ...] = ()) -> None:
        if isinstance(target, ast.Name):
            self.rebound.add(target.id)
            self.bindings.setdefault(target.id, []).append((how, (value, path) if path else value))
        elif isinstance(target, ast.Tuple | ast.List):
            pairs = not path and how == "value" and isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
            for place, each in enumerate(target.elts):
                if pairs:
                    self._target(each, how, value.elts[place])
                else:
                    self._target(each, how, value, (*path, place))
        elif isinstance(target, ast.Starred):
            self._target(target.value, how, value, path)
        elif isinstance(target, ast.Attribute) and dotted(target.value) == self.first and how == "value" and not path:
            self.assigned_to_self.setdefault(target.attr, []).append(value)

    # ---- types of names and expressions

    def type_of_name(self, name: str) -> frozenset:
        """The type of a local or global name."""
        if name == self.first and self.cls is not None:
            kind = "class" if "classmethod" in self.function.decorators else "instance"
            return frozenset({(kind, self.cls)})
        if name in self.bindings:
            if name not in self._names:
                self._names[name] = NO_TYPE
                self._names[name] = NO_TYPE.union(*(self._bound(*each) for each in self.bindings[name]))
            return self._names[name]
        found = self.program.find(self.module, name)
        if isinstance(found, Function):
            return frozenset({("function", found, None)})
        if isinstance(found, Class):
            return frozenset({("class", found)})
        if isinstance(found, Module):
            return frozenset({("module", found)})
        if isinstance(found, tuple) and found[0] == "value":
            if found[3] is not None:
                return self.types.annotated(found[1], found[3])
            return self.types.outer(found[1]).type_of(found[2]) if found[2] is not None else NO_TYPE
        return NO_TYPE

    def _bound(self, how: str, value: Any) -> frozenset:
        value, path = value if isinstance(value, tuple) else (value, ())
        if how == "annotation":
            found = self.types.annotated(self.module, value, self.cls)
        elif how == "many":
            found = frozenset({("sequence", self.types.annotated(self.module, value, self.cls))})
        elif how == "table":
            found = frozenset({("mapping", NO_TYPE, self.types.annotated(self.module, value, self.cls))})
        elif how == "element":
            found = self.types.element(self.type_of(value))
        elif how == "entered":
            found = self._entered(value)
        else:
            found = self.type_of(value)
        for place in path:
            inner: frozenset = NO_TYPE
            for each in found:
                if each[0] == "tuple":
                    inner |= each[1][place] if place < len(each[1]) else NO_TYPE
                else:
                    inner |= self.types.element(frozenset({each}))
            found = inner
        return found

    def _entered(self, node: ast.expr) -> frozenset:
        for function, _ in self.targets(node.func) if isinstance(node, ast.Call) else ():
            if function.is_context:
                return self.types.element(self.types.returned(function, function.owner))
        return self.type_of(node)

    def type_of(self, node: ast.expr) -> frozenset:
        """The type of an expression, as far as it can be told."""
        if node not in self._types:
            self._types[node] = NO_TYPE
            self._types[node] = self._type_of(node)
        return self._types[node]

    def _type_of(self, node: ast.expr) -> frozenset:
        if isinstance(node, ast.Name):
            return self.type_of_name(node.id)
        if isinstance(node, ast.Attribute):
            return NO_TYPE.union(*(self._attribute(each, node.attr) for each in self.type_of(node.value)))
        if isinstance(node, ast.Call):
            return self._called(node)
        if isinstance(node, ast.Subscript):
            return NO_TYPE.union(*(self._item(each, node) for each in self.type_of(node.value)))
        if isinstance(node, ast.IfExp):
            return self.type_of(node.body) | self.type_of(node.orelse)
        if isinstance(node, ast.BoolOp):
            return NO_TYPE.union(*(self.type_of(each) for each in node.values))
        if isinstance(node, ast.NamedExpr | ast.Await | ast.Starred):
            return self.type_of(node.value)
        if isinstance(node, ast.Tuple):
            return frozenset({("tuple", tuple(self.type_of(each) for each in node.elts))})
        if isinstance(node, ast.List | ast.Set):
            return frozenset({("sequence", NO_TYPE.union(*(self.type_of(each) for each in node.elts)))})
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp):
            return frozenset({("sequence", self.type_of(node.elt))})
        if isinstance(node, ast.Dict):
            keys = NO_TYPE.union(*(self.type_of(each) for each in node.keys if each is not None))
            values = [self.type_of(value) for key, value in zip(node.keys, node.values, strict=True) if key is not None]
            return frozenset({("mapping", keys, NO_TYPE.union(*values))})
        if isinstance(node, ast.DictComp):
            return frozenset({("mapping", self.type_of(node.key), self.type_of(node.value))})
        if isinstance(node, ast.BinOp):
            return self.type_of(node.left) | self.type_of(node.right)
        return NO_TYPE

    def _attribute(self, kind: tuple, name: str) -> frozenset:
        if kind[0] == "instance":
            return self.types.attribute(kind[1], name)
        if kind[0] == "class":
            function = self.program.method(kind[1], name)
            return NO_TYPE if function is None else frozenset({("function", function, kind[1])})
        if kind[0] == "module":
            found = self.program.find(kind[1], name)
            if isinstance(found, Function):
                return frozenset({("function", found, None)})
            return frozenset({("class", found)}) if isinstance(found, Class) else NO_TYPE
        return NO_TYPE

    def _item(self, kind: tuple, node: ast.Subscript) -> frozenset:
        if kind[0] == "mapping":
            return kind[2]
        if kind[0] == "sequence":
            return frozenset({kind}) if isinstance(node.slice, ast.Slice) else kind[1]
        if kind[0] == "tuple":
            place = node.slice.value if isinstance(node.slice, ast.Constant) else None
            inside = isinstance(place, int) and place < len(kind[1])
            return kind[1][place] if inside else NO_TYPE.union(*kind[1])
        if kind[0] == "instance" and (function := self.program.method(kind[1], "__getitem__")):
            return self.types.returned(function, kind[1])
        return NO_TYPE

    def _called(self, node: ast.Call) -> frozenset:
        found: frozenset = NO_TYPE
        for each in self.type_of(node.func):
            if each[0] == "function":
                found |= self.types.returned(each[1], each[2])
            elif each[0] == "class":
                found |= {("instance", each[1])}
        if found:
            return found
        first = self.type_of(node.args[0]) if node.args else NO_TYPE
        name = dotted(node.func)
        if name in {"list", "tuple", "sorted", "reversed", "set", "iter", "frozenset"}:
            return frozenset({("sequence", self.types.element(first))})
        if name in {"next", "min", "max"}:
            return self.types.element(first)
        if name in {"replace", "copy", "deepcopy", "cast"}:
            return self.type_of(node.args[-1]) if name == "cast" else first
        if name == "enumerate":
            return frozenset({("sequence", frozenset({("tuple", (NO_TYPE, self.types.element(first)))}))})
        if name == "zip":
            parts = tuple(self.types.element(self.type_of(each)) for each in node.args)
            return frozenset({("sequence", frozenset({("tuple", parts)}))})
        if name == "dict":
            return first
        if name == "super":
            return frozenset({("super", self.cls, self.function.owner)}) if self.cls else NO_TYPE
        if isinstance(node.func, ast.Attribute):
            return NO_TYPE.union(*(self._of_table(each, node.func.attr) for each in self.type_of(node.func.value)))
        return NO_TYPE

    def _of_table(self, kind: tuple, name: str) -> frozenset:
        keys, values = kind[1:] if kind[0] == "mapping" else (NO_TYPE, NO_TYPE)
        if kind[0] == "instance" and (function := self.program.method(kind[1], "__getitem__")):
            values = self.types.returned(function, kind[1])
        if name in {"get", "pop", "setdefault"}:
            return values or (self.types.element(frozenset({kind})) if kind[0] == "sequence" else NO_TYPE)
        if name == "items":
            return frozenset({("sequence", frozenset({("tuple", (keys, values))}))})
        if name in {"values", "keys"}:
            return frozenset({("sequence", values if name == "values" else keys)})
        return NO_TYPE

    def targets(self, node: ast.expr) -> list[tuple[Function, Class | None]]:
        """The functions of ours that calling an expression runs, each with the class of its `self`."""
        found: list[tuple[Function, Class | None]] = []
        if isinstance(node, ast.Attribute):
            for kind in self.type_of(node.value):
                if kind[0] == "super":
                    function = self.program.method(kind[1], node.attr, after=kind[2])
                    found += [] if function is None else [(function, kind[1])]
                elif kind[0] == "instance" and isinstance(node.value, ast.Name) and node.value.id == self.first:
                    function = self.program.method(kind[1], node.attr)
                    found += [] if function is None else [(function, kind[1])]
                elif kind[0] == "instance" and self.program.method(kind[1], node.attr):
                    found += self.program.overrides(kind[1], node.attr)
            if found:
                return [each for each in found if not each[0].is_property]
        for kind in self.type_of(node):
            if kind[0] == "function" and not kind[1].is_property:
                found.append((kind[1], kind[2]))
            elif kind[0] == "class":
                for name in ("__new__", "__init__", "__post_init__"):
                    function = self.program.method(kind[1], name)
                    found += [] if function is None else [(function, kind[1])]
            elif kind[0] == "instance" and (function := self.program.method(kind[1], "__call__")):
                found.append((function, kind[1]))
        return found

    def named(self, node: ast.expr) -> Iterator[str]:
        """Names of the exception classes that an expression names."""
        if isinstance(node, ast.Tuple):
            for each in node.elts:
                yield from self.named(each)
        elif isinstance(node, ast.Name):
            found = self.program.find(self.module, node.id)
            if isinstance(found, tuple) and found[0] == "value":
                yield from self.types.outer(found[1]).named(found[2])
            else:
                yield node.id
        else:
            yield ast.unparse(node).split(".")[-1]
