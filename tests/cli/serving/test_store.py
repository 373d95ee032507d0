"""store add, list, remove, rename, compact, rebase: what they do is what the library does, and --json is JSON alone."""

import json
import shutil
from pathlib import Path

import pytest

from eigenpeft import AdapterCollection, AdapterStore, PrincipalSubspace, SubspaceBuilder
from tests.factories import random_factors, write_adapter


@pytest.fixture
def folder(adapters, tmp_path, monkeypatch):
    """A working folder with a subspace and a wider one."""
    with AdapterCollection.from_pretrained(adapters.folder) as collection:
        wide = SubspaceBuilder(9).fit(collection).subspace_
    wide.truncate(5).save_pretrained(tmp_path / "subspace")
    wide.save_pretrained(tmp_path / "wide")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_store_from_the_command_line_alone(run, folder):
    added = json.loads(run("store", "add", "store", "adapters", "--subspace", "subspace", "--json").out)
    assert set(added["added"]) == {f"adapter-{i}" for i in range(5)}
    assert (
        "Added 1 to store, which has 6 adapters now."
        in run("store", "add", "store", "adapters/adapter-1", "--name", "x").out
    )
    assert run("store", "rename", "store", "x", "y").code == 0
    assert run("store", "remove", "store", "adapter-0", "adapter-2").code == 0
    listed = json.loads(run("store", "list", "store", "--json").out)
    assert list(listed["adapters"]) == ["adapter-1", "adapter-3", "adapter-4", "y"]
    assert listed["adapters"]["y"]["cores"] == ["low_rank"]
    assert "y" in run("store", "list", "store").out
    assert json.loads(run("store", "compact", "store", "--json").out)["freed_bytes"] > 0
    assert len(list(Path("store/members").iterdir())) == 1
    moved = json.loads(run("store", "rebase", "store", "wide", "--out", "wider", "--json").out)
    assert list(moved["adapters"]) == list(listed["adapters"])
    for name, row in moved["adapters"].items():
        assert row["mean_error"] == pytest.approx(listed["adapters"][name]["mean_error"], abs=1e-4)
    assert run("export", "wider", "y", "--out", "lora").code == 0
    assert AdapterStore.from_pretrained("store").subspace == PrincipalSubspace.from_pretrained("subspace")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("add", "nowhere", "adapters/adapter-1"), "No adapter store at 'nowhere'"),
        (("add", "store", "adapters/adapter-1"), "'adapter-1' is in the store already"),
        (("add", "store", "adapters", "--name", "x"), "goes with one adapter, and 5 are named"),
        (("add", "store", "adapters/adapter-1", "--subspace", "wide"), "is not the subspace of the store"),
        (("add", "store", "other"), "1 of the 1 adapted modules are not in the subspace"),
        (("remove", "store", "adapter-1", "nobody"), "'nobody' is not in the store"),
        (("rename", "store", "nobody", "x"), "'nobody' is not in the store"),
        (("rebase", "store", "wide", "--out", "store"), "holds another store"),
    ],
)
def test_bad_input_is_one_message_and_changes_nothing(run, folder, arguments, message):
    run("store", "add", "store", "adapters/adapter-1", "--subspace", "subspace")
    write_adapter(folder / "other", random_factors(modules={"layer.7.query": (12, 20)}))
    before = {path: path.read_bytes() for path in Path("store").rglob("*") if path.is_file()}
    result = run("store", *arguments)
    assert result.code == 1
    assert message in " ".join(result.err.split())
    assert before == {path: path.read_bytes() for path in Path("store").rglob("*") if path.is_file()}


def test_project_never_replaces_a_store(run, folder):
    assert run("project", "subspace", "adapters", "--out", "store").code == 0
    before = {path: path.read_bytes() for path in Path("store").rglob("*") if path.is_file()}
    result = run("project", "subspace", "adapters/adapter-1", "--out", "store")
    assert result.code == 1
    assert before == {path: path.read_bytes() for path in Path("store").rglob("*") if path.is_file()}


def test_a_store_of_format_1_is_listed_and_brought_up(run, tmp_path, monkeypatch):
    shutil.copytree(Path(__file__).parents[2] / "data" / "format_1" / "store", tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    before = json.loads(run("store", "list", "store", "--json").out)
    assert run("store", "remove", "store", "adapter-0").code == 1
    assert run("store", "compact", "store").code == 0
    after = json.loads(run("store", "list", "store", "--json").out)
    assert after["adapters"] == before["adapters"]
    assert run("store", "remove", "store", "adapter-0").code == 0
