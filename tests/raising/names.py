"""The functions, classes and names of a package, read from its source."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any


def walk(root: ast.AST) -> list[ast.AST]:
    """A node and all below it; `ast.walk` at several times its speed."""
    found = [root]
    for node in found:
        for value in node.__dict__.values():
            if type(value) is list:
                found += [each for each in value if isinstance(each, ast.AST)]
            elif isinstance(value, ast.AST):
                found.append(value)
    return found


def names_in(node: ast.AST) -> set[str]:
    """Names that an expression reads."""
    return {node.id} if type(node) is ast.Name else {each.id for each in walk(node) if type(each) is ast.Name}


def dotted(node: ast.AST) -> str:
    """A name with its dots; nothing for other expressions."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@dataclass(eq=False, repr=False)
class Function:
    """A function or method."""

    module: "Module"
    node: Any
    owner: "Class | None" = None

    @property
    def name(self) -> str:
        return f"{self.owner.name}.{self.node.name}" if self.owner else self.node.name

    @property
    def place(self) -> str:
        """Module and name, without the package."""
        return f"{self.module.name.partition('.')[2]}.{self.name}"

    @cached_property
    def decorators(self) -> set[str]:
        return {ast.unparse(each).split("(")[0].split(".")[-1] for each in self.node.decorator_list}

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Everything in it."""
        return walk(self.node)

    @property
    def is_property(self) -> bool:
        return bool(self.decorators & {"property", "cached_property"})

    @property
    def is_context(self) -> bool:
        return "contextmanager" in self.decorators

    @property
    def is_static(self) -> bool:
        return "staticmethod" in self.decorators

    @property
    def is_abstract(self) -> bool:
        body = [
            each for each in self.node.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        ]
        return "abstractmethod" in self.decorators or not body

    @cached_property
    def parameters(self) -> list[str]:
        names = [each.arg for each in (*self.node.args.posonlyargs, *self.node.args.args)]
        return names[1:] if self.owner and not self.is_static else names

    @cached_property
    def defaults(self) -> dict[str, ast.expr]:
        arguments = self.node.args
        plain = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
        found = dict(zip(plain[len(plain) - len(arguments.defaults) :], arguments.defaults, strict=True))
        keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        return {**found, **{each.arg: default for each, default in keywords if default is not None}}

    @cached_property
    def keywords(self) -> set[str]:
        return {*self.parameters, *(each.arg for each in self.node.args.kwonlyargs)}

    @cached_property
    def decisive(self) -> set[str]:
        """Parameters that a test or a further call depends on."""
        found: set[str] = set()
        for node in self.nodes:
            if isinstance(node, ast.If | ast.IfExp | ast.While):
                found |= names_in(node.test)
            elif isinstance(node, ast.BoolOp):
                found |= names_in(node.values[0])
            elif isinstance(node, ast.Call):
                found |= {each.id for each in node.args if isinstance(each, ast.Name)}
                found |= {each.value.id for each in node.keywords if isinstance(each.value, ast.Name)}
        return found & self.keywords


@dataclass(eq=False, repr=False)
class Class:
    """A class with its own methods and annotated fields."""

    module: "Module"
    node: ast.ClassDef
    methods: dict[str, Function] = field(default_factory=dict)
    fields: dict[str, ast.expr] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.node.name


@dataclass(eq=False, repr=False)
class Module:
    """A module with what its names stand for."""

    name: str
    path: Path
    tree: ast.Module
    names: dict[str, Any] = field(default_factory=dict)


class Program:
    """The sources of a package, their names resolved.

    Args:
        folder: The package.
    """

    def __init__(self, folder: Path):
        self.modules: dict[str, Module] = {}
        self.functions: list[Function] = []
        self.classes: list[Class] = []
        for path in sorted(folder.rglob("*.py")):
            parts = (folder.name, *path.relative_to(folder).with_suffix("").parts)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self.modules[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
        for module in self.modules.values():
            self._collect(module, module.tree.body)
        self._lines: dict[Class, list[Class]] = {}

    def _collect(self, module: Module, body: Iterable[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    module.names[alias.asname or alias.name] = ("import", node.module, alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    module.names[alias.asname or alias.name.split(".")[0]] = ("module", alias.asname and alias.name)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                module.names[node.name] = Function(module, node)
                self.functions.append(module.names[node.name])
            elif isinstance(node, ast.ClassDef):
                made = module.names[node.name] = Class(module, node)
                self.classes.append(made)
                for each in node.body:
                    if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                        function = Function(module, each, made)
                        if not {"setter", "overload"} & function.decorators:
                            made.methods[each.name] = function
                            self.functions.append(function)
                    elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                        made.fields[each.target.id] = each.annotation
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        module.names[target.id] = ("value", module, node.value, None)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                module.names[node.target.id] = ("value", module, node.value, node.annotation)
            elif isinstance(node, ast.If | ast.Try):
                self._collect(module, node.body)
                self._collect(module, node.orelse)

    def find(self, module: Module, name: str) -> Any:
        """What a name of a module stands for: a function, a class, a module, a value's tuple, or None."""
        for _ in range(12):
            found = module.names.get(name)
            if not (isinstance(found, tuple) and found[0] == "import"):
                return found
            _, place, name = found
            if f"{place}.{name}" in self.modules:
                return self.modules[f"{place}.{name}"]
            if place not in self.modules:
                return ("outside", place, name)
            module = self.modules[place]
        return None

    def line(self, cls: Class) -> list[Class]:
        """A class and its bases among ours, as Python looks a method up."""
        if cls not in self._lines:
            found = [cls]
            for base in cls.node.bases:
                target = self.class_named(cls.module, base)
                if target is not None:
                    found = [*(each for each in found if each not in self.line(target)), *self.line(target)]
            self._lines[cls] = found
        return self._lines[cls]

    def class_named(self, module: Module, node: ast.expr) -> Class | None:
        """The class of ours that an expression names."""
        while isinstance(node, ast.Subscript):
            node = node.value
        found = self.find(module, node.id) if isinstance(node, ast.Name) else None
        return found if isinstance(found, Class) else None

    def bases_outside(self, cls: Class) -> set[str]:
        """Names of the bases that are not ours."""
        named = (ast.unparse(base).split("[")[0].split(".")[-1] for each in self.line(cls) for base in each.node.bases)
        return {name for name in named if not isinstance(self.find(cls.module, name), Class)}

    def method(self, cls: Class, name: str, *, after: Class | None = None) -> Function | None:
        """A method as Python looks it up, after a class where `super()` asks for it."""
        line = self.line(cls)
        for each in line[line.index(after) + 1 :] if after in line else line:
            if name in each.methods:
                return each.methods[name]
        return None

    def overrides(self, cls: Class, name: str) -> list[tuple[Function, Class]]:
        """What a method call on an instance of a class may reach: its own method, or, if abstract, those of its subclasses."""
        own = self.method(cls, name)
        if own is not None and not own.is_abstract and "Protocol" not in self.bases_outside(cls):
            return [(own, cls)]
        if "Protocol" in self.bases_outside(cls):
            below = [
                each for each in self.classes if each is not cls and all(self.method(each, one) for one in cls.methods)
            ]
        else:
            below = [each for each in self.classes if each is not cls and cls in self.line(each)]
        found = [(self.method(each, name), each) for each in below]
        return [(function, each) for function, each in found if function is not None and not function.is_abstract]
