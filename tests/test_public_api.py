"""The public surface: few names, each documented, each argument in its docstring, everything after the first keyword-only."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import eigenpeft
from eigenpeft.deprecation import MOVED_MODULES

HERE = Path(eigenpeft.__file__).parent
NAMES = [name for name in eigenpeft.__all__ if name != "__version__"]
# Subclasses of PEFT's dataclass configs: their fields are described once, in metadata["help"].
CONFIGS = [name for name in NAMES if name.endswith("Config")]
ROOMS = sorted(
    ".".join(("eigenpeft", *path.parent.relative_to(HERE).parts))
    for path in HERE.rglob("__init__.py")
    if "__all__ = [" in path.read_text(encoding="utf-8")
)
# Everything after the first argument is keyword-only in every room, except the second of two that belong together and have
# one order. Never a third.
PAIRS = {
    ("a", "b"): "two of one kind, and their order makes no difference",
    ("chosen", "rejected"): "the two sides of a comparison, in TRL's order",
    ("coefficients_out", "coefficients_in"): "the factors of one core, in the order of their product",
    ("cores", "weights"): "the summands and their weights",
    ("features", "user_ids"): "row i of the one belongs to entry i of the other",
    ("folder", "out_dir"): "what is read, and where it is written",
    ("lora_B", "lora_A"): "the factors of one update, in the order of their product",
    ("model_or_store", "out_dir"): "what is written, and where",
    ("model_or_store", "out_file"): "what is written, and where",
    ("name", "new_name"): "a rename, from and to",
    ("prompts", "candidates"): "prompt i and its candidates",
    ("statistics", "out_dir"): "what is written, and where",
    ("subspace", "collection"): "the bases, and what is projected onto them",
}
# A method that overrides one of PEFT's, transformers', TRL's, Flower's or torch's has their signature, and so has a config
# that extends theirs. These two have a host's signature without overriding a method.
HOSTS = {
    "LoReTrainer": "a trainer of transformers or TRL takes its model and its arguments",
    "ZerothOrderMixin.training_step": "transformers' Trainer calls it",
}
SMALL_RECORD = 3  # A dataclass with no more fields may be built in their order; a named tuple is built as any tuple is.
EXTRAS = {  # room to what it cannot be imported without, and why its test is then skipped
    "eigenpeft.federated": ("flwr", "Flower is heavy and has an environment of its own: make federated"),
    "eigenpeft.trainers": (
        "trl",
        "LoReTrainer cannot be imported without the extra trl, which CI's main environment has",
    ),
}


def test_names_exist_and_are_few():
    assert len(NAMES) <= 12
    assert all(hasattr(eigenpeft, name) for name in eigenpeft.__all__)


def test_no_public_name_hides_a_module():
    modules = {info.name for info in pkgutil.iter_modules(eigenpeft.__path__)}
    assert not modules & set(NAMES)


def test_audit_is_short_for_audit_adapters_and_its_package_is_still_found():
    from eigenpeft.audit import AuditReport

    assert callable(eigenpeft.audit)
    assert eigenpeft.audit.audit_adapters is eigenpeft.audit_adapters
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'collection'"):
        eigenpeft.audit()
    assert AuditReport.__module__ == "eigenpeft.audit.report"


def test_old_places_still_work_and_name_the_new_ones():
    import eigenpeft.auditing
    import eigenpeft.subspace

    with pytest.warns(DeprecationWarning, match=r"use eigenpeft\.audit\.gradient_share"):
        assert eigenpeft.auditing.gradient_share is not None
    with pytest.warns(DeprecationWarning, match=r"use eigenpeft\.audit\.audit_adapters"):
        assert eigenpeft.auditing.audit is eigenpeft.audit_adapters
    with pytest.warns(DeprecationWarning, match=r"use eigenpeft\.SubspaceBuilder"):
        assert eigenpeft.subspace.SubspaceBuilder is eigenpeft.SubspaceBuilder
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = eigenpeft.auditing.nothing


@pytest.mark.parametrize(
    ("name", "room"),
    [
        ("AdapterIndex", "indexing"),
        ("build_subspace", "building"),
        ("init_lora_from_subspace", "tuners"),
        ("nearest_adapters", "audit"),
    ],
)
def test_names_that_moved_to_their_rooms_still_work_and_the_warning_shows_the_line_that_uses_them(name, room):
    with pytest.warns(DeprecationWarning, match=rf"use eigenpeft\.{room}\.{name}\.$") as caught:
        found = getattr(eigenpeft, name)
    assert found is getattr(importlib.import_module(f"eigenpeft.{room}"), name)
    assert [warning.filename for warning in caught] == [__file__]
    assert name not in eigenpeft.__all__


@pytest.mark.parametrize(("old", "new"), MOVED_MODULES.items())
def test_old_modules_still_import_and_name_the_new_ones(old, new):
    sys.modules.pop(f"eigenpeft.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"eigenpeft\.{old} is deprecated .* import eigenpeft\.{new}\."):
        alias = importlib.import_module(f"eigenpeft.{old}")
    module = importlib.import_module(f"eigenpeft.{new}")
    names = [name for name in vars(module) if not name.startswith("__")]
    assert names
    assert all(getattr(alias, name) is getattr(module, name) for name in names)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_documented(name):
    assert (getattr(eigenpeft, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", CONFIGS)
def test_config_fields_are_described_once(name):
    cls = getattr(eigenpeft, name)
    own = [field for field in dataclasses.fields(cls) if field.name in cls.__dict__.get("__annotations__", {})]
    assert own
    for field in own:
        assert field.metadata.get("help"), f"{name}.{field.name} has no help"
        assert not re.search(rf"^\s+{field.name}:", cls.__doc__, re.M), f"{name}.{field.name} is described twice"


def public_callables():
    for name in NAMES:
        thing = getattr(eigenpeft, name)
        if inspect.isclass(thing) and name not in CONFIGS and not issubclass(thing, Exception):
            for attribute, value in vars(thing).items():
                function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
                if inspect.isfunction(function) and not attribute.startswith("_"):
                    yield pytest.param(function, True, id=f"{name}.{attribute}")
            yield pytest.param(thing, False, id=name)
        elif inspect.isfunction(thing):
            yield pytest.param(thing, False, id=name)


@pytest.mark.parametrize(("function", "is_method"), public_callables())
def test_arguments_are_documented(function, is_method):
    parameters = list(inspect.signature(function).parameters.values())[1 if is_method else 0 :]
    documentation = inspect.getdoc(function) or ""
    for parameter in parameters:
        assert re.search(rf"^\s*\*{{0,2}}{parameter.name}:", documentation, re.M), f"{parameter.name} is not documented"


def is_ours(thing):
    return getattr(thing, "__module__", "").startswith("eigenpeft")


def room_callables(room):
    """Name, function and number of arguments that may go by position, of what a room publishes and no host has laid down."""
    module = importlib.import_module(room)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isfunction(thing):
            yield name, thing, 1
        elif inspect.isclass(thing) and not issubclass(thing, Exception):
            hosts = [base for base in thing.__mro__[1:] if not is_ours(base) and base is not object]
            is_record = dataclasses.is_dataclass(thing)
            if is_ours(thing.__init__) and not any(dataclasses.is_dataclass(base) for base in hosts):
                yield name, thing, SMALL_RECORD if is_record else 1
            for attribute in dir(thing):
                bound = getattr(thing, attribute)
                public = not attribute.startswith("_") or attribute == "__call__"
                if public and callable(bound) and not any(hasattr(base, attribute) for base in hosts):
                    is_plain = inspect.isfunction(inspect.getattr_static(thing, attribute))
                    yield f"{name}.{attribute}", functools.partial(bound, None) if is_plain else bound, 1


def positional_arguments(room):
    """Name and positional arguments of the callables of a room that take more of them than they may without a reason."""
    for name, function, allowed in room_callables(room):
        parameters = inspect.signature(function).parameters.values()
        positional = tuple(each.name for each in parameters if each.kind <= each.POSITIONAL_OR_KEYWORD)
        if len(positional) > allowed:
            yield name, positional


@pytest.fixture(scope="module")
def by_position():
    """The rooms whose extras are installed, each with its `positional_arguments`."""
    there = [room for room in ROOMS if room not in EXTRAS or find_spec(EXTRAS[room][0])]
    return {room: list(positional_arguments(room)) for room in there}


@pytest.mark.parametrize("room", ROOMS)
def test_everything_after_the_first_argument_is_keyword_only(room, by_position):
    if room not in by_position:
        pytest.skip(EXTRAS[room][1])
    assert not [(name, found) for name, found in by_position[room] if found not in PAIRS and name not in HOSTS]


def test_every_exception_is_used(by_position):
    if "eigenpeft.trainers" not in by_position:  # the room of Flower has no exceptions
        pytest.skip(EXTRAS["eigenpeft.trainers"][1])
    rows = [row for found in by_position.values() for row in found]
    assert set(PAIRS) <= {positional for _, positional in rows}
    assert set(HOSTS) <= {name for name, _ in rows}
    assert all(len(pair) == 2 and reason for pair, reason in PAIRS.items())


def test_importing_is_cheap_and_every_name_comes_when_it_is_used():
    code = (
        "import sys, eigenpeft\n"
        "assert not {'torch', 'peft', 'transformers'} & set(sys.modules), 'imported at once'\n"
        "assert set(eigenpeft.__all__) <= set(dir(eigenpeft))\n"
        "assert all(getattr(eigenpeft, name) is not None for name in eigenpeft.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900)


@pytest.mark.parametrize("first", ["eigenpeft", "peft"])
def test_the_methods_are_known_whichever_is_imported_first(first):
    second = {"eigenpeft": "peft", "peft": "eigenpeft"}[first]
    code = (
        f"import {first}, {second}, peft, eigenpeft\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known\n"
        "assert {'EIGENLORA', 'MOSLORA'} <= {kind.value for kind in known}\n"
        "assert type(peft.__spec__.loader).__name__ == 'SourceFileLoader', peft.__spec__.loader\n"
        "assert not [one for one in __import__('sys').meta_path if type(one).__name__ == '_Waiting']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900)


def test_importing_needs_no_extra_and_registers_the_methods():
    code = (
        "import sys, eigenpeft\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known\n"
        "assert {'EIGENLORA', 'MOSLORA'} <= {kind.value for kind in known}\n"
        "assert 'trl' not in sys.modules and 'matplotlib' not in sys.modules and 'datasets' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900)
