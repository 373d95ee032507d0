"""Docstrings name every error that a function of ours raises, itself or by what it calls; nothing is imported here."""

import ast
import gc
import re
from pathlib import Path

import pytest

from tests.raising import Class, Errors, Function, Program

SOURCE = Path(__file__).parents[1] / "src" / "eigenpeft"
# Faults of the library itself, and what Python's own protocols are made of.
NOT_DOCUMENTED = {"AssertionError", "AttributeError", "NotImplementedError", "RuntimeError", "StopIteration"}
DUNDERS = ("__call__", "__contains__", "__getitem__", "__iter__")
# (caller, what it calls, error): why this call cannot raise what its target could. Patterns as of fnmatch.
IMPOSSIBLE = {
    ("*", "artifacts.records.index.lines_of", "*Error"): "a log writes changes that it made itself",
    ("audit.*", "[bl]*", "[TV]*Error"): "sizes of the collection itself",
    ("audit.run.audit_adapters", "audit.task.calibration.load_calibration", "ArtifactError"): "the file that ships",
    ("*", "building.builder.SubspaceBuilder.fit", "[AL]*Error"): "no work folder is passed",
    ("collection.formats.settings.settings_of", "collection.*", "ValueError"): "patterns are checked before",
    ("combining.federation.averaging._accumulated", "linalg.*", "ValueError"): "the rank of the factors themselves",
    ("indexing.index.AdapterIndex.from_pretrained", "*.__init__", "EigenPeftError"): "max_rows is checked before",
    ("linalg.[do]*.[!p]*", "linalg.orthogonal.orthonormal_rows", "ValueError"): "no more rows than columns",
    ("reward.evaluation.evaluate.*", "linalg.*", "ValueError"): "no part of the split is empty",
    ("subspace.controls.mean_only_subspace", "linalg.*", "ValueError"): "updates of zero are left out",
    ("subspace.controls.random_subspace", "*", "*Error"): "sizes of bases that exist",
    ("subspace.principal.read_subspace", "*.__init__", "SubspaceError"): "a file without modules is refused before",
    ("subspace.stores.absorbing._fitted", "linalg.*", "*Error"): "max_components is checked before",
    ("subspace.stores.adapter_files.*", "collection.formats.weights.file_sha256", "OSError"): "the file is open",
    ("subspace.*", "subspace.core.*", "SubspaceError"): "parts that were made to fit",
    ("subspace.stores.store.AdapterStore.[_f]*", "*._put", "ArtifactError"): "a new store is in memory",
    ("trainers.lore_trainer.LoReTrainer.__init__", "trainers.lore_config.*", "ValueError"): "defaults",
    ("trainers.policy_sync.save_plain_lora", "tuners.files.export.read_adapter", "KeyError"): "a model, not a store",
    ("tuners.*", "subspace.cores.core_kind", "SubspaceError"): "a config has checked its core",
    ("tuners.*.add_weighted_adapter", "*.inject_adapter", "*Error"): "the adapters are in the model already",
    ("tuners.eigenlora.warm_start.*", "subspace.core*", "SubspaceError"): "cores that exist already",
    ("tuners.files.export._truncated", "linalg.*", "ValueError"): "rank is checked before",
    ("tuners.files.store_export.*", "collection.formats.settings.*", "ValueError"): "patterns are checked before",
    ("tuners.sequence.growing.*", "linalg.*", "ValueError"): "there are new classes",
    ("tuners.shardlora.*", "[bl]*", "[SV]*Error"): "a config has checked share, and room is checked before",
}
# Errors that docstrings name rightly though no `raise` of ours leads there.
NOT_SEEN = {
    "a dictionary's own": [
        ("artifacts.records.log.RecordLog.read", "KeyError"),
        ("artifacts.records.log.RecordLog.size", "KeyError"),
        ("artifacts.records.source.RecordSource.read", "KeyError"),
        ("artifacts.records.source.RecordSource.size", "KeyError"),
        ("artifacts.tensor_file.TensorFile.dtype", "KeyError"),
        ("audit.task.calibration.Calibration.unseen", "KeyError"),
        ("engines.catalog.StoreCatalog.names", "KeyError"),
        ("subspace.stores.member.AdapterMember.__getitem__", "KeyError"),
        ("tuners.learning_rates.suggested_learning_rate", "KeyError"),
    ],
    "the file system's own": [
        ("reward.text.features.embed_preferences", "OSError"),
        ("reward.text.features_cache.FeaturesCache", "OSError"),
    ],
    "of zip(strict=True)": [
        ("collection.diagnosis.Diagnosis.observe_norms", "ValueError"),
        ("linalg.merging.factor_means.mean_of_factors", "ValueError"),
        ("linalg.merging.factor_means.residual_of_factor_mean", "ValueError"),
        ("linalg.scores.nulls.chance_cosine", "ValueError"),
        ("linalg.scores.prototypes.prototype_logits", "ValueError"),
        ("linalg.zeroth_order.replay", "ValueError"),
        ("linalg.zeroth_order.slope_along", "ValueError"),
    ],
    "PEFT's own": [
        ("tuners.starts.adapters.init_lora_from_adapter", "TypeError"),
        ("tuners.starts.adapters.lora_config_from_adapter", "TypeError"),
        ("tuners.starts.components.init_lora_from_subspace", "TypeError"),
        ("tuners.starts.components.lora_config_from_subspace", "TypeError"),
    ],
    "vLLM's own": [
        ("engines.vllm_hooks.StoreResolver.resolve_lora", "VLLMNotFoundError"),
        ("engines.vllm_hooks.StoreResolver.resolve_lora", "VLLMValidationError"),
    ],
    "from a module that is imported when vLLM calls": [("engines.vllm_plugin.register", "EigenPeftError")],
    "of a field that a dataclass lacks": [("recycling.report.Trial.from_dict", "TypeError")],
    "by one of the kinds alone": [("subspace.cores.CoreKind.start", "SubspaceError")],
    "when a model is made": [("tuners.eigenlora.config.EigenLoraConfig", "SubspaceNotFoundError")],
}


def documented(text: str | None) -> set[str]:
    """Names of the errors in the section `Raises:` of a docstring."""
    section = re.search(r"^Raises:\n((?:[ \t]+.*\n|\n)+)", f"{text or ''}\n", re.M)
    entries = re.findall(r"^    ([A-Z]\w+(?:, [A-Z]\w+)*):", section[1], re.M) if section else []
    return {name for entry in entries for name in entry.split(", ")}


def public_things(program: Program):
    """The functions and classes whose names have no underscore in front; those of commands have help texts instead."""
    for module in program.modules.values():
        if not module.name.startswith("eigenpeft.cli"):
            named = (thing for name, thing in module.names.items() if not name.startswith("_"))
            yield from (thing for thing in named if isinstance(thing, Function | Class))


def callables(program: Program):
    """Place, docstring and what is run, of every public function, class and method."""
    for thing in public_things(program):
        place = f"{thing.module.name.partition('.')[2]}.{thing.name}"
        if isinstance(thing, Function):
            yield place, ast.get_docstring(thing.node), [(thing, None)]
            continue
        made = [program.method(thing, name) for name in ("__new__", "__init__", "__post_init__")]
        yield place, ast.get_docstring(thing.node), [(each, thing) for each in made if each is not None]
        methods = {name: method for base in reversed(program.line(thing)) for name, method in base.methods.items()}
        for name, method in methods.items():
            if not name.startswith("_") or name in DUNDERS:
                yield f"{place}.{name}", ast.get_docstring(method.node), program.overrides(thing, name)


@pytest.fixture(scope="module")
def errors():
    gc.disable()  # the nodes of all syntax trees stay, and to look through them again and again takes a third of the time
    try:
        yield Errors(Program(SOURCE), impossible=IMPOSSIBLE)
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def found(errors):
    """Place to its docstring's errors, and to those that it can raise with the calls that lead there."""
    table = {}
    for place, text, runs in callables(errors.program):
        raised = {}
        for function, cls in runs:
            raised = errors.of(function, cls) | raised
        table[place] = documented(text), {name: way for name, way in raised.items() if name not in NOT_DOCUMENTED}
    return table


def test_every_error_is_documented(errors, found):
    missing = [
        f"{place} lacks {name}, raised at {way[-1]} by way of {' > '.join(way)}"
        for place, (named, raised) in found.items()
        for name, way in raised.items()
        if not errors.ancestors(name) & named
    ]
    assert not missing, "\n".join(missing)


def test_no_docstring_names_an_error_that_is_never_raised(errors, found):
    never = {
        (place, name)
        for place, (named, raised) in found.items()
        for name in named
        if not any(name in errors.ancestors(each) for each in raised)
    }
    assert never == {each for rows in NOT_SEEN.values() for each in rows}


def test_every_exception_is_used(errors, found):
    assert found
    assert errors.met == set(IMPOSSIBLE)
    assert len(IMPOSSIBLE) <= 25


# What small programs raise from `f`; their `g` raises OurError, a ValueError.
PROGRAMS = {
    "its own": ("def f(): raise OurError('no')", {"OurError"}),
    "of a function": ("def f(): g()", {"OurError"}),
    "in a comprehension": ("def f(): return [g() for _ in '']", {"OurError"}),
    "of a function that is passed on": ("def f(): return list(map(g, ''))", {"OurError"}),
    "of a class": ("class A:\n def __post_init__(self): g()\ndef f(): return A()", {"OurError"}),
    "of a method": ("class A:\n def m(self): g()\ndef f(a: 'A'): a.m()", {"OurError"}),
    "of a property": ("class A:\n @property\n def p(self): g()\ndef f(a: 'A | None'): return a.p", {"OurError"}),
    "of an attribute": (
        "class A:\n def m(self): g()\nclass B:\n def __init__(self): self.a, self.b = A(), 1\ndef f(): B().a.m()",
        {"OurError"},
    ),
    "of each element": ("class A:\n def m(self): g()\ndef f(all: 'list[A]'):\n for a in all: a.m()", {"OurError"}),
    "of an abstract method": (
        "class A:\n @abstractmethod\n def m(self): ...\nclass B(A):\n def m(self): g()\ndef f(a: 'A'): a.m()",
        {"OurError"},
    ),
    "not of a method that a subclass has": (
        "class A:\n def m(self): pass\nclass B(A):\n def m(self): g()\ndef f(a: 'A'): a.m()",
        set(),
    ),
    "of a protocol": (
        "class A(Protocol):\n def m(self): ...\nclass B:\n def m(self): g()\ndef f(a: 'A'): a.m()",
        {"OurError"},
    ),
    "caught": ("def f():\n try: g()\n except ValueError: pass", set()),
    "not caught": ("def f():\n try: g()\n except KeyError: pass", {"OurError"}),
    "raised again": ("def f():\n try: g()\n except ValueError: raise", {"OurError"}),
    "raised again in part": (
        "def f():\n try: g()\n except ValueError as e:\n  if isinstance(e, OurError): raise\n  raise OSError from e",
        {"OurError", "OSError"},
    ),
    "turned into another": ("def f():\n try: g()\n except ValueError as e: raise OSError from e", {"OSError"}),
    "suppressed": ("def f():\n with suppress(ValueError): g()", set()),
    "turned into another by a context": (
        "@contextmanager\ndef c():\n try: yield\n except OurError as e: raise OSError from e\ndef f():\n with c(): g()",
        {"OSError"},
    ),
    "excluded by a constant": ("def h(n=1):\n if n is None: g()\ndef f(): h()", set()),
    "not excluded": ("def h(n=1):\n if n is None: g()\ndef f(n): h(n)", {"OurError"}),
    "excluded by a name that the library chose": ("def h(a):\n if a not in TABLE: raise OurError\ndef f(): h('a')", set()),
    "of a name that the user chose": ("def h(a):\n if a not in TABLE: raise OurError\ndef f(a): h(a)", {"OurError"}),
    "a number that the library chose": ("def h(n: int):\n if n < 1: raise ValueError\ndef f(rows): h(len(rows))", set()),
    "a number that the user chose": ("def h(n: int):\n if n < 1: raise ValueError\ndef f(n: int): h(n)", {"ValueError"}),
    "a key that the library found": (
        "class T:\n def __getitem__(self, key): raise KeyError\ndef f(t: 'T'): return [t[key] for key in t]",
        set(),
    ),
    "a key that the user asked for": (
        "class T:\n def __getitem__(self, key): raise KeyError\ndef f(t: 'T', key: str): return t[key]",
        {"KeyError"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), PROGRAMS.values(), ids=PROGRAMS)
def test_calls_are_followed(tmp_path, text, expected):
    package = tmp_path / "eigenpeft"
    package.mkdir()
    g = "class OurError(ValueError): ...\ndef g(): raise OurError\n"
    (package / "one.py").write_text(g + text)
    program = Program(package)
    assert set(Errors(program).of(program.modules["eigenpeft.one"].names["f"])) == expected


def test_sections_are_read():
    text = "One.\n\nArgs:\n    a: A.\n\nRaises:\n    OSError, KeyError: If so,\n        and so.\n    ValueError: Else."
    assert documented(text) == {"OSError", "KeyError", "ValueError"}
    assert documented(f"{text}\n\nExample:\n    TypeError: 1") == {"OSError", "KeyError", "ValueError"}
    assert documented("One.") == documented(None) == set()
