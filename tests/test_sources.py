"""What the sources promise about themselves: layers, file texts, sizes, no pickles. Nothing is imported here."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "eigenpeft"
FILES = sorted(SOURCE.rglob("*.py"))

# Number = layer (docs/architecture.md). A file imports from lower layers, or from those named for its own.
LAYERS = {
    "version": 0,
    "errors": 0,
    "deprecation": 0,
    "lazy": 0,
    "artifacts": 1,
    "linalg": 1,
    "collection": 2,
    "subspace": 3,
    "building": 4,
    "combining": 5,
    "audit": 5,
    "tuners": 5,
    "reward": 5,
    "trainers": 6,
    "engines": 6,
    "federated": 6,
    "report": 6,
    "indexing": 6,
    "publish": 6,
    "recycling": 7,
    "demo": 7,
    "cli": 8,
    "auditing": 8,
    "__main__": 9,
}
# Third-party packages a layer's files may import; the layers above may import them too.
LINALG_MAY_IMPORT = {"torch", "jaxtyping", "eigenpeft", "collections", "dataclasses", "math", "typing", "enum"}


def module_name(path: Path) -> str:
    parts = ("eigenpeft", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module, line, is inside a function) of every import statement."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.lineno, id(node) in inside))
    return found


def layer(module: str) -> int:
    return LAYERS[module.split(".")[1]]


def graph() -> dict[str, set[str]]:
    known = {module_name(path) for path in FILES}
    edges: dict[str, set[str]] = {}
    for path in FILES:
        targets = set()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eigenpeft"):
                for alias in node.names:
                    deeper = f"{node.module}.{alias.name}"
                    targets.add(deeper if deeper in known else node.module)
        edges[module_name(path)] = targets - {module_name(path)}
    return edges


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent != SOURCE or path.stem in LAYERS], ids=module_name
)
def test_imports_go_down_the_layers(path):
    own = layer(module_name(path))
    for name, line, _ in imports(path):
        if name.startswith("eigenpeft."):
            assert layer(name) <= own, f"{path.name}:{line} (layer {own}) imports {name} (layer {layer(name)})"


def test_no_import_cycle():
    edges = graph()
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in edges.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_what_the_tuners_stand_on_can_be_imported_first():
    # The first import of PEFT imports eigenpeft.tuners: a module that they need, and that imports PEFT, would be half done then.
    edges = graph()
    needed: set[str] = set()
    waiting = ["eigenpeft.tuners"]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += edges.get(name, ())
    below = [path for path in FILES if module_name(path) in needed and "tuners" not in path.parts]
    assert below
    for path in below:
        assert [line for name, line, _ in imports(path) if name.split(".")[0] == "peft"] == [], path.name


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_import_inside_a_function(path):
    assert [(name, line) for name, line, inside in imports(path) if inside] == []


@pytest.mark.parametrize("path", sorted((SOURCE / "linalg").rglob("*.py")), ids=module_name)
def test_linalg_needs_torch_alone(path):
    assert {name.split(".")[0] for name, _, _ in imports(path)} <= LINALG_MAY_IMPORT


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_first_line_says_the_job_and_the_room_is_small(path):
    text = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "no module docstring"
    assert docstring.splitlines()[0].endswith("."), docstring.splitlines()[0]
    assert len(text.splitlines()) <= 500


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_unpickles(path):
    text = path.read_text(encoding="utf-8")
    assert "import pickle" not in text
    for call in ast.walk(ast.parse(text)):
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and ast.unparse(call.func) == "torch.load"
        ):
            assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("weights_only") == "True"


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.body[0].end_lineno or 0) - node.body[0].lineno + 1 if ast.get_docstring(node) else 0


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_functions_fit_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1 - _docstring_lines(node)
            assert lines <= 60, f"{path.name}:{node.lineno} {node.name} has {lines} lines without its docstring"


def test_only_the_table_of_cores_asks_which_core_it_is():
    table = SOURCE / "subspace" / "cores.py"
    asking = re.compile(r"""\bcore(\.name|\.kind)? (==|!=|in) ?[("']""")
    assert [path.name for path in FILES if path != table and asking.search(path.read_text(encoding="utf-8"))] == []


PACKAGES = sorted({path.parent for path in FILES})


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: module_name(folder / "__init__.py"))
def test_a_package_has_at_most_twelve_files_and_its_init(folder):
    files = sorted(path.name for path in folder.glob("*.py"))
    assert "__init__.py" in files
    assert len(files) <= 13, f"{len(files)} files: put those that do one job together into a room of their own"


def test_the_architecture_lists_every_file():
    listed: dict[str, set[str]] = {}
    package = ""
    for line in (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"  (\w+)/\s", line):
            package = found[1]
        elif found := re.match(r"    ([\w/]+\.py)\s+\S", line):
            listed.setdefault(package, set()).add(found[1])
    for folder in (path for path in SOURCE.iterdir() if (path / "__init__.py").is_file()):
        files = {str(path.relative_to(folder)) for path in folder.rglob("*.py") if path.name != "__init__.py"}
        assert listed[folder.name] == files


RECIPES = sorted((SOURCE.parents[1] / "recipes").glob("*.py"))
HEADER = ("Paper", "Command", "Hardware", "Time", "Expected")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_headers_have_one_form(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert tuple(re.findall(r"(?m)^([A-Z]\w+):  ", text)) == HEADER
    assert f"python recipes/{path.name}" in text or f"launch recipes/{path.name}" in text
