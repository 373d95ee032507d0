"""The public surface: few names, each documented, each argument in its docstring, everything after the first keyword-only."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys

import pytest

import eigenpeft
from eigenpeft.deprecation import MOVED_MODULES

NAMES = [name for name in eigenpeft.__all__ if name != "__version__"]
# Subclasses of PEFT's dataclass configs: their fields are described once, in metadata["help"].
CONFIGS = [name for name in NAMES if name.endswith("Config")]
# Everything after the first argument is keyword-only, except the second of two that make no sense apart and have one order.
OBVIOUS_PAIRS = {
    ("chosen", "rejected"),
    ("features", "user_ids"),
    ("model_or_store", "out_dir"),
    ("name", "new_name"),
    ("prompts", "candidates"),
    ("subspace", "collection"),
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
def test_arguments_are_documented_and_keyword_only(function, is_method):
    parameters = list(inspect.signature(function).parameters.values())[1 if is_method else 0 :]
    documentation = inspect.getdoc(function) or ""
    for parameter in parameters:
        assert re.search(rf"^\s*\*{{0,2}}{parameter.name}:", documentation, re.M), f"{parameter.name} is not documented"
    positional = tuple(p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD)
    assert len(positional) <= 1 or positional in OBVIOUS_PAIRS, f"make keyword-only: {positional[1:]}"


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
