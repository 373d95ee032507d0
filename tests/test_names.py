"""One word for one concept: words that were given up do not come back as a parameter, an attribute or an option."""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.test_public_api import EXTRAS, ROOMS, is_ours, room_callables

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))

# Each word with the one in use. The glossary (docs/glossary.md) says what the latter mean.
GIVEN_UP = {
    "base_revision": "base_model_revision",
    "coefficients_lr": "coefficients_learning_rate",
    "collator": "data_collator",
    "digest": "fingerprint",
    "exist_ok": "overwrite",
    "force": "overwrite",
    "head_rate": "head_learning_rate",
    "holdout": "held_out",
    "loadings": "coefficients",
    "lora_dim": "r or rank",
    "lr": "learning_rate",
    "mixer_lr": "mixer_learning_rate",
    "n_comparisons": "n_pairs",
    "n_examples": "n_rows",
    "n_in": "n_components_in",
    "n_out": "n_components_out",
    "n_samples": "n_rows",
    "n_zoos": "n_collections",
    "num_components": "n_components",
    "output_dir": "out_dir",
    "patience": "timeout",
    "random_state": "seed or generator",
    "save_dir": "save_directory or out_dir",
    "show_progress": "progress",
    "standardise": "standardize",
    "tokenizer": "processing_class",
    "top": "top_k",
    "zoo": "collection",
}
# Parameters that were given up and are still options of commands, each with the one in use.
GIVEN_UP_PARAMETERS = {"dataset": "rows", "task": "name"}
# Options of commands that were given up and are still names of parameters, each with the one in use.
GIVEN_UP_OPTIONS = {"base": "model", "base_model": "model", "rows": "n_rows"}
# Arguments of commands that stand without an option's name and were given up, each with the one in use.
GIVEN_UP_POSITIONALS = {"data": "dataset", "path": "folder, or what it is", "rows": "dataset"}
# Options of recipes that mean one thing: the word, the recipes that it is for, the other word.
OPTIONS_BELONG_TO = {"data": ("train_zoo", "dataset; that recipe takes a folder with the data sets of many tasks")}
# Words that mean one thing, and what else they must not be said of: the word, the rooms or names it is for, the other word.
BELONGS_TO = {
    # Adapters that a server has and keeps; what a forward pass keeps for the backward pass.
    "kept": (r"SyncReport|low_rank_update_grad", "kept_share, kept_squared_norm or kept_aside"),
    "method": (
        r"SubspaceBuilder|SubspaceInfo|build_shared_subspace|fit_bases|stack_rows|leading_components",
        "rule",
    ),
    "save_directory": (r"\w+\.save_pretrained", "out_dir"),
    "sha256": (r"InputStatistics", "fingerprint"),
    # Which modules have one bank. What is measured of a gradient is a share too, and the name of its class says of what.
    "share": (
        r"SubspaceBuilder|ShardLoraConfig|audit_adapters|GradientShare|ModuleGradient",
        "held_share, or what it is of",
    ),
}


def parameters(room):
    """Name and parameters of everything that a room publishes and no host has laid down, the fields of its configs included."""
    yield from ((name, list(inspect.signature(function).parameters)) for name, function, _ in room_callables(room))
    module = importlib.import_module(room)
    for name, thing in ((name, getattr(module, name)) for name in module.__all__):
        if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
            given = {
                field for base in thing.__mro__ if not is_ours(base) for field in vars(base).get("__annotations__", ())
            }
            yield name, [field.name for field in dataclasses.fields(thing) if field.name not in given]


def attributes(room):
    """Name and public attributes of the classes that a room publishes, without what their hosts have."""
    module = importlib.import_module(room)
    for name, thing in ((name, getattr(module, name)) for name in module.__all__):
        if inspect.isclass(thing):
            hosts = [base for base in thing.__mro__ if not is_ours(base)]
            yield name, [each for each in dir(thing) if not any(hasattr(base, each) for base in hosts)]


@functools.cache
def names_of(room):
    if room in EXTRAS and not find_spec(EXTRAS[room][0]):
        pytest.skip(EXTRAS[room][1])
    return list(parameters(room)), list(attributes(room))


@pytest.mark.parametrize("room", ROOMS)
def test_no_word_that_was_given_up_comes_back(room):
    words = GIVEN_UP | GIVEN_UP_PARAMETERS
    found = [(name, each) for part in names_of(room) for name, own in part for each in own if each in words]
    assert not found, f"{[(name, each, 'now ' + words[each]) for name, each in found]}"


@pytest.mark.parametrize("room", ROOMS)
def test_words_with_one_meaning_are_said_of_nothing_else(room):
    for name, own in names_of(room)[0]:
        for each in own:
            allowed, other = BELONGS_TO.get(each, (None, None))
            assert allowed is None or re.fullmatch(allowed, name), f"{name} takes {each}; the word for it is {other}"


@pytest.mark.parametrize("word", BELONGS_TO)
def test_words_with_one_meaning_are_in_use(word):
    rooms = [room for room in ROOMS if room not in EXTRAS]
    assert any(word in own for room in rooms for _, own in names_of(room)[0])


def written_names(pattern):
    """What stands in backticks at the start of the rows of docs/commands.md, written as the code writes it."""
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    return {name.lower().replace("-", "_") for name in re.findall(rf"^\| `{pattern}`", text, re.MULTILINE)}


def test_no_command_has_an_option_that_was_given_up():
    options = written_names("--([a-z0-9-]+)")
    assert len(options) > 50
    assert not options & {*GIVEN_UP, *GIVEN_UP_OPTIONS}


def test_no_command_has_a_positional_that_was_given_up():
    positionals = written_names("([A-Z][A-Z_]*)")
    assert len(positionals) > 10
    assert not positionals & {*GIVEN_UP, *GIVEN_UP_OPTIONS, *GIVEN_UP_POSITIONALS}


def recipe_options(file):
    """Options that a recipe defines: fields of its own dataclasses, and what it adds to a parser."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(each) for each in node.decorator_list):
            yield from (each.target.id for each in node.body if isinstance(each, ast.AnnAssign))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument"):
            yield ast.literal_eval(node.args[0]).lstrip("-").replace("-", "_")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_no_recipe_has_an_option_that_was_given_up(file):
    options = set(recipe_options(file))
    assert options
    assert not options & {*GIVEN_UP, *GIVEN_UP_OPTIONS}
    wrong = {
        each: other for each, (recipes, other) in OPTIONS_BELONG_TO.items() if not re.fullmatch(recipes, file.stem)
    }
    assert not options & {*wrong}, f"now {wrong}"
