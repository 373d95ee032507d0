"""store add, absorb, list, remove, rename, compact, rebase: what they do is what the library does, and --json is JSON alone."""

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from eigenpeft import AdapterCollection, AdapterStore, EigenLoraConfig, PrincipalSubspace, SubspaceBuilder
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
    assert "adapter-3" in run("inspect", "store").out
    assert list(json.loads(run("inspect", "store", "--json").out)["members"]) == list(listed["adapters"])
    assert AdapterStore.from_pretrained("store").subspace == PrincipalSubspace.from_pretrained("subspace")


def test_sizes_of_originals_and_store_are_said(run, folder):
    """In words and in JSON, by add, list and inspect, and all the same."""
    added = run("store", "add", "store", "adapters", "--subspace", "subspace").out
    original = sum(path.stat().st_size for path in Path("adapters").rglob("adapter_model.safetensors"))
    store = AdapterStore.from_pretrained("store")
    sizes = {"bytes": store.n_bytes, "subspace_bytes": store.subspace.n_bytes, "original_bytes": original}
    sizes["ratio"] = store.n_bytes / original
    sentence = f"5 adapters are {original / 1000:,.1f} kB as plain LoRAs and {store.n_bytes / 1000:,.1f} kB here"
    for told in (added, run("store", "list", "store").out, run("inspect", "store").out):
        assert sentence in " ".join(told.split())
    listed = json.loads(run("store", "list", "store", "--json").out)
    again = json.loads(run("store", "add", "store", "adapters/adapter-0", "--replace", "--json").out)
    for found in (listed, json.loads(run("inspect", "store", "--json").out)["store"], again):
        assert {name: found[name] for name in sizes} == pytest.approx(sizes)


def test_the_card_says_what_is_there_after_every_change(run, folder):
    def card():
        return " ".join(Path("store/README.md").read_text().split())

    run("store", "add", "store", "adapters", "--subspace", "subspace")
    assert "When this card was written there were 5:" in card()
    assert "| adapter-4 |" in card()
    run("store", "rename", "store", "adapter-4", "mine")
    assert "| mine | adapter-4 |" in card()  # its name now, and its source
    run("store", "remove", "store", "mine", "adapter-0", "adapter-1", "adapter-2")
    assert "When this card was written there was 1:" in card()
    opened = AdapterStore.from_pretrained("store")
    opened.remove("adapter-3")
    assert "there was 1:" in card()  # a change from Python writes the member alone, and the title counts nothing
    assert "# Adapter store of LoRA adapters in one subspace" in card()
    opened.compact()
    assert "there were none yet." in card()
    run("store", "absorb", "store", "adapters/adapter-1")
    assert "there was 1:" in card()


def test_what_was_added_before_a_refusal_is_on_the_card(run, folder):
    write_adapter(folder / "other", random_factors(modules={"layer.7.query": (12, 20)}))
    assert run("store", "add", "store", "adapters/adapter-1", "other", "--subspace", "subspace").code == 1
    assert "| adapter-1 |" in Path("store/README.md").read_text()


def test_a_card_that_was_edited_by_hand_stays(run, folder):
    run("store", "add", "store", "adapters/adapter-1", "--subspace", "subspace")
    Path("store/README.md").write_text("# Ours\n")
    told = run("store", "add", "store", "adapters/adapter-2")
    assert (told.code, Path("store/README.md").read_text()) == (0, "# Ours\n")
    assert "README.md of store was edited by hand and stays as it is" in told.out


def test_add_to_a_store_that_is_not_there_names_what_makes_one(run, folder):
    told = run("store", "add", "store", "adapters")
    assert (told.code, "There is no store 'store' yet; --subspace FOLDER makes one" in " ".join(told.err.split())) == (
        1,
        True,
    )


def test_add_warns_of_an_adapter_that_the_bases_do_not_hold(run, folder):
    write_adapter(folder / "new", random_factors(rank=2, seed=9))
    shown = " ".join(run("store", "add", "store", "adapters", "new", "--subspace", "subspace").out.split())
    assert "new may not do what it did: the store's bases hold " in shown
    assert "`eigenpeft store absorb store ADAPTER --replace`" in shown
    assert shown.count("may not do") == 1
    run("store", "absorb", "store", "new", "--replace", "--held-share", "1")
    assert AdapterStore.from_pretrained("store")["new"].relative_errors == pytest.approx(
        dict.fromkeys(AdapterStore.from_pretrained("store")["new"].relative_errors, 0.0), abs=1e-3
    )


def test_absorb_says_what_grew_and_what_was_lost(run, folder):
    run("store", "add", "store", "adapters", "--subspace", "subspace")
    shutil.copytree("store", "bounded")
    write_adapter(folder / "new", random_factors(rank=2, seed=9))
    told = json.loads(run("store", "absorb", "store", "new", "--held-share", "1", "--json").out)
    assert list(told["absorbed"]) == ["new"]
    assert (told["moved"], told["n_adapters"]) == ({}, 6)
    assert {(tuple(row["before"]), tuple(row["after"])) for row in told["banks"].values()} == {((5, 5), (7, 7))}
    assert told["held_after"] == pytest.approx(1.0, abs=1e-4)
    assert "No other member changed." in run("store", "absorb", "store", "new", "--replace").out
    shown = run("store", "absorb", "bounded", "new", "--max-components", "6").out
    assert "5 members moved and lost" in shown
    assert "6 x 6" in shown


def test_rebase_takes_trained_adapters(run, folder):
    """An adapter trained on the narrow bases, saved by PEFT itself, becomes a member in the wide ones."""
    bases = PrincipalSubspace.from_pretrained("subspace")
    model = torch.nn.Sequential(OrderedDict(layer=torch.nn.ModuleDict()))
    for name, bank in bases.items():
        place = model
        for part in name.split(".")[:-1]:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.add_module(name.split(".")[-1], torch.nn.Linear(bank.in_features, bank.out_features, bias=False))
    tuned = get_peft_model(model, EigenLoraConfig(subspace="subspace", r=2, init_lora_weights=False))
    tuned.save_pretrained("trained/mine")
    told = json.loads(run("store", "rebase", "trained", "wide", "--out", "moved", "--json").out)
    assert list(told["adapters"]) == ["mine"]
    moved, own = AdapterStore.from_pretrained("moved"), AdapterStore(bases)
    own.add("trained/mine")
    for module in bases:
        both = [
            pair[0] @ pair[1] for pair in (moved.factors("mine", module=module), own.factors("mine", module=module))
        ]
        torch.testing.assert_close(*both, rtol=0, atol=1e-5)
        assert float(both[0].norm()) > 0.1
    assert "only EigenLoRA adapters are moved" in run("store", "rebase", "adapters", "wide", "--out", "x").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("add", "nowhere", "adapters/adapter-1"), "There is no store 'nowhere' yet"),
        (("add", "store", "adapters/adapter-1"), "'adapter-1' is in the store already"),
        (("add", "store", "adapters", "--name", "x"), "goes with one adapter, and 5 are named"),
        (("add", "store", "adapters/adapter-1", "--subspace", "wide"), "is not the subspace of the store"),
        (("add", "store", "other"), "1 of the 1 adapted modules are not in the subspace"),
        (("remove", "store", "adapter-1", "nobody"), "'nobody' is not in the store"),
        (("rename", "store", "nobody", "x"), "'nobody' is not in the store"),
        (("rebase", "store", "wide", "--out", "store"), "holds another store"),
        (("absorb", "store", "adapters/adapter-1"), "'adapter-1' is in the store already"),
        (("absorb", "store", "other", "--held-share", "2"), "must be in (0, 1]"),
        (("absorb", "nowhere", "adapters"), "No adapter store at 'nowhere'"),
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
