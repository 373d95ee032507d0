"""Errors name the options of the command that was typed, in the place of Python's arguments; JSON on stdout is JSON."""

import json
import math
import shutil

import click
import pytest

from eigenpeft import AdapterCollection, AdapterStore, SubspaceBuilder
from eigenpeft.cli.app import print_json
from eigenpeft.cli.messages import as_options
from tests.factories import make_collection

PROGRAM = click.Group(
    commands={
        "build": click.Command(
            "build",
            params=[
                click.Option(["--n-components", "-k", "n_components"]),
                click.Option(["--method"]),
                click.Option(["--overwrite"], is_flag=True),
                click.Option(["--trim/--no-trim"], is_flag=True),
                click.Argument(["adapters"]),
            ],
        ),
        "store": click.Group(commands={"add": click.Command("add", params=[click.Option(["--name"])])}),
    }
)


@pytest.mark.parametrize(
    ("words", "message", "expected"),
    [
        (["build", "a"], "pass n_components=8, or method='paired'.", "pass --n-components 8, or --method paired."),
        (["-v", "build"], "method='odd' must be one of 'a', 'b'", "--method odd must be one of 'a', 'b'"),
        (["build"], "pass overwrite=True (--overwrite on the command line) to", "pass --overwrite to"),
        (["build"], "pass overwrite=False, trim=False, method=None", "pass no --overwrite, --no-trim, no --method"),
        (["store", "add"], "another name=, or name= here", "another --name, or --name here"),
        (["store", "add"], "with overwrite=True, adapters='x'", "with overwrite=True, adapters='x'"),
        (["build"], "'runs/method=paired' and 'a method=b' differ", "'runs/method=paired' and 'a method=b' differ"),
        (["build"], "the adapters' own method='x' isn't read", "the adapters' own --method x isn't read"),
        (["build"], "a/method=b, call fit(method='x')", "a/method=b, call fit(method='x')"),
        ([], "pass overwrite=True", "pass overwrite=True"),
        (["odd"], "move it with rebase().", "move it with `eigenpeft store rebase`."),
    ],
)
def test_arguments_become_options(words, message, expected):
    assert as_options(message, PROGRAM, words) == expected


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a subspace, a paired one, a store in each, and adapters, one of them of another base model."""
    place = tmp_path_factory.mktemp("made")
    make_collection(place / "adapters", rank=(2, 4), n_shared=6, noise=0.05)
    with AdapterCollection.from_pretrained(place / "adapters") as collection:
        for name, options in (("subspace", {}), ("paired", {"method": "paired"})):
            subspace = SubspaceBuilder(5, **options).fit(collection).subspace_
            subspace.save_pretrained(place / name)
            store = AdapterStore(subspace)
            store.add(place / "adapters" / "adapter-1")
            store.save_pretrained(place / f"store-{name}")
    config = place / "adapters" / "adapter-2" / "adapter_config.json"
    config.write_text(config.read_text().replace('"base_model_name_or_path": "', '"base_model_name_or_path": "other-'))
    return place


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """The working folder: a copy of what was made."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("store", "add", "store-subspace", "adapters/adapter-1"), "pass another --name, --replace, or remove"),
        (("store", "add", "store-subspace", "adapters/adapter-2"), "pass --allow-different-base-models."),
        (("store", "absorb", "store-subspace", "adapters/adapter-1"), "--replace, or remove that member first"),
        (("store", "absorb", "store-subspace", "adapters/adapter-3", "--max-components", "0"), "--max-components 0 must be"),
        (("store", "absorb", "store-paired", "adapters/adapter-3"), "with `eigenpeft build --method paired` from all"),
        (("store", "absorb", "store-paired", "adapters/adapter-3"), "with `eigenpeft store rebase`"),
        (("store", "rebase", "store-subspace", "subspace", "--out", "store-paired"), "(`eigenpeft store add`), or pass"),
        (("project", "subspace", "adapters/adapter-1", "--out", "store-paired"), "or pass --overwrite to replace it"),
        (("build", "adapters", "--out", "x"), "pass --allow-different-base-models."),
        (("build", "adapters/adapter-1", "--out", "subspace"), "pass --overwrite to replace it"),
        (("build", "adapters/adapter-1", "--out", "x", "--method", "odd"), "--method odd must be"),
        (("export", "store-subspace", "adapter-1", "--out", "store-subspace"), "Choose"),
    ],
)  # fmt: skip
def test_the_remedy_is_an_option_of_the_command(run, folder, arguments, remedy):
    told = run(*arguments)
    assert told.code == 1
    assert remedy in " ".join(told.err.split())
    assert "=True" not in told.err
    assert "()" not in told.err


def test_a_store_is_replaced_by_one_in_other_bases(run, folder):
    run("store", "rebase", "store-paired", "paired", "--out", "moved")
    told = run("store", "rebase", "store-subspace", "subspace", "--out", "moved", "--overwrite")
    assert (told.code, told.err) == (0, "")
    assert "adapter-1" in run("store", "list", "moved").out


def test_json_has_null_for_what_is_not_finite(capsys):
    print_json({"loss": [math.inf, 1.5], "lead": (math.nan, 2)})
    assert json.loads(capsys.readouterr().out) == {"loss": [None, 1.5], "lead": [None, 2]}
