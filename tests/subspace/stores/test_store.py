"""AdapterStore: members alone, exact round trips, damage found, errors that are those of ΔW."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load, load_file, save, save_file

import eigenpeft
import eigenpeft.subspace
import eigenpeft.subspace.stores.store
from eigenpeft import AdapterCollection, AdapterStore, EigenLoraConfig, PrincipalSubspace, SubspaceBuilder, export_lora
from eigenpeft.errors import ArtifactError, CollectionError, SubspaceError, SubspaceNotFoundError
from eigenpeft.subspace import AdapterMember, Core
from tests.factories import MODULES, make_collection, random_factors, write_adapter


@pytest.fixture
def made(tmp_path):
    made = make_collection(tmp_path / "adapters", rank=(4, 2), n_shared=6, noise=0.3)
    fewer = {"layer.0.query": MODULES["layer.0.query"]}
    write_adapter(tmp_path / "adapters" / "partial", random_factors(modules=fewer, rank=3, seed=3))
    return made


@pytest.fixture
def store(made):
    with AdapterCollection.from_pretrained(made.folder) as collection:
        subspace = SubspaceBuilder(n_components=5).fit(collection).subspace_
        return AdapterStore.from_collection(subspace, collection)


def test_errors_are_those_of_the_update(made, store):
    for name, updates in made.updates.items():
        for module, update in updates.items():
            lora_B, lora_A = store.factors(name, module=module)
            error = torch.linalg.norm(update - lora_B.double() @ lora_A.double()) / torch.linalg.norm(update)
            assert store.relative_errors[module][name] == pytest.approx(float(error), rel=1e-3)


def test_missing_modules_stay_missing(store):
    assert store["partial"].keys() == {"layer.0.query"}
    assert store.factors("partial", module="layer.1.query") is None
    assert "partial" not in store.relative_errors["layer.1.query"]
    assert store["adapter-0"]["layer.1.query"].coefficients_in.shape == (4, 5)
    assert store["adapter-1"]["layer.1.query"].coefficients_out.shape == (5, 2)


def same(member, other):
    assert member.cores.keys() == other.cores.keys()
    for module, core in member.items():
        assert (core.kind, core.scaling) == (other[module].kind, other[module].scaling)
        assert core.parts.keys() == other[module].parts.keys()
        assert all(torch.equal(tensor, other[module].parts[part]) for part, tensor in core.parts.items())
    assert member.kept_aside.keys() == other.kept_aside.keys()
    assert all(torch.equal(tensor, other.kept_aside[key]) for key, tensor in member.kept_aside.items())
    assert (member.relative_errors, member.paths) == (other.relative_errors, other.paths)
    return True


def test_save_and_load_are_exact(store, tmp_path):
    before = {name: store[name] for name in store}
    store.save_pretrained(tmp_path / "store")
    loaded = AdapterStore.from_pretrained(tmp_path / "store")
    assert loaded.names == store.names == tuple(before)
    assert loaded.members == store.members
    assert loaded.subspace == store.subspace
    assert all(same(loaded[name], before[name]) for name in before)
    size = sum(path.stat().st_size for path in (tmp_path / "store" / "members").iterdir())
    assert loaded.n_bytes == store.n_bytes == store.subspace.n_bytes + size


def test_a_member_is_read_alone(store, tmp_path):
    store.save_pretrained(tmp_path / "store")
    for name in ("first", "second"):
        store.add(tmp_path / "adapters" / "partial", name=name)
    shards = tmp_path / "store" / "members"
    assert len(list(shards.iterdir())) == 3  # the joined ones, and one per added member
    loaded = AdapterStore.from_pretrained(tmp_path / "store")
    for file in store.files():
        if file.endswith(".shard") and file != f"members/{loaded._records._state.places['second'].shard}.shard":
            (tmp_path / "store" / file).unlink()
    assert same(loaded["second"], store["second"])
    with pytest.raises(ArtifactError, match=r"which holds 'first', is missing\. Get a fresh copy"):
        loaded["first"]


def test_a_digest_names_a_member_as_it_is(store, tmp_path):
    store.save_pretrained(tmp_path / "s")
    again = AdapterStore.from_pretrained(tmp_path / "s")
    before = {name: again.fingerprint(name) for name in again.names}
    assert len(set(before.values())) == len(again)
    assert before == {name: AdapterStore.from_pretrained(tmp_path / "s").fingerprint(name) for name in again.names}
    first, second = again.names[:2]
    again.add(again[second], name=first, replace=True)
    assert again.fingerprint(first) != before[first]
    assert again.fingerprint(second) == before[second]
    moved = again.rebase(again.subspace.truncate(4))
    assert moved.fingerprint(second) != before[second]
    with pytest.raises(KeyError, match="'nobody' is not in the store"):
        again.fingerprint("nobody")


def test_cores_are_dense_and_in_order(store):
    dense = store.cores("layer.1.query")
    assert dense.shape == (6, 5, 5)
    for row, name in enumerate(store):
        core = store.coefficients(name, module="layer.1.query")
        expected = torch.zeros(5, 5) if core is None else core.coefficients_out @ core.coefficients_in
        torch.testing.assert_close(dense[row], expected)
    assert torch.equal(store.cores("layer.1.query", names=["adapter-3", "adapter-0"]), dense[[3, 0]])


def test_a_store_serves_as_a_subspace(store, tmp_path):
    store.save_pretrained(tmp_path / "store")
    assert PrincipalSubspace.from_pretrained(tmp_path / "store") == store.subspace
    store.subspace.save_pretrained(tmp_path / "subspace")
    with pytest.raises(ArtifactError, match=r"is not an adapter store: it has no store_config\.json"):
        AdapterStore.from_pretrained(tmp_path / "subspace")


def test_unknown_members_name_the_known(store):
    with pytest.raises(KeyError, match="'nobody' is not in the store; it has 6 adapters: 'adapter-0'"):
        store["nobody"]


def test_a_damaged_store_is_one_error(store, tmp_path):
    folder = tmp_path / "store"
    store.save_pretrained(folder)
    config, index = folder / "store_config.json", folder / "members.index"
    whole, lines = json.loads(config.read_text()), index.read_bytes().splitlines(keepends=True)
    for damage, message in (
        ({"subspace_sha256": "0"}, "a file was altered"),
        ({"format_version": 3}, "format_version 3"),
    ):
        config.write_text(json.dumps(whole | damage))
        with pytest.raises(ArtifactError, match=message):
            AdapterStore.from_pretrained(folder)
    config.write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read as JSON"):
        AdapterStore.from_pretrained(folder)
    config.write_text(json.dumps(whole))
    for damaged in (lines[1:], [lines[0], lines[2], *lines[3:]], [*lines[:2], lines[2].replace(b"start", b"stort")]):
        index.write_bytes(b"".join(damaged))
        with pytest.raises(ArtifactError, match=r"members\.index' was altered after its first"):
            AdapterStore.from_pretrained(folder)
    index.unlink()
    with pytest.raises(ArtifactError, match=r"incomplete: it has no members\.index"):
        AdapterStore.from_pretrained(folder)
    with pytest.raises(SubspaceNotFoundError, match="No adapter store at"):
        AdapterStore.from_pretrained(tmp_path / "elsewhere")


def test_every_byte_of_a_member_is_checked(store, tmp_path):
    store.save_pretrained(tmp_path / "store")
    (shard,) = (tmp_path / "store" / "members").iterdir()
    whole, place = shard.read_bytes(), store._records._state.places["adapter-1"]
    for position in range(place.start, place.start + place.size, 97):
        damaged = bytearray(whole)
        damaged[position] ^= 16
        shard.write_bytes(damaged)
        opened = AdapterStore.from_pretrained(tmp_path / "store")
        assert opened["adapter-0"].cores
        with pytest.raises(ArtifactError, match="of 'adapter-1' in .* are not those that were written"):
            opened["adapter-1"]
        with pytest.raises(ArtifactError, match="'adapter-1'"):
            export_lora(opened, tmp_path / "out", adapter_name="adapter-1")
    shard.write_bytes(whole[: place.start + 10])
    with pytest.raises(ArtifactError, match="truncated or altered"):
        AdapterStore.from_pretrained(tmp_path / "store")["adapter-1"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: Core("diagonal", {"coefficients_out": torch.ones(9)}), "is for 9 x 9 components"),
        (lambda c: Core("diagonal", {"coefficients_out": torch.tensor([1.0, float("nan")])}), "NaN or infinite"),
        (
            lambda c: Core("full", {"coefficients_out": torch.ones(2, 2, dtype=torch.int32)}),
            "instead of floating-point",
        ),
    ],
)
def test_members_that_do_not_fit_are_refused_in_memory_and_on_disk(store, tmp_path, change, message):
    bad = AdapterMember({"layer.0.query": change(store["adapter-0"]["layer.0.query"])})
    with pytest.raises(SubspaceError, match=message):
        AdapterStore(store.subspace, members={"bad": bad})
    # A file whose hashes are right and whose content is not, as somebody else may have made it.
    store.save_pretrained(tmp_path / "store")
    store._records.append("bad", bad.to_bytes())
    with pytest.raises(ArtifactError, match="The member 'bad' of the store cannot be read"):
        AdapterStore.from_pretrained(tmp_path / "store")["bad"]
    assert AdapterStore.from_pretrained(tmp_path / "store")["adapter-0"].cores


def test_the_same_member_has_the_same_bytes():
    core = Core("diagonal", {"coefficients_out": torch.ones(2)})
    member = AdapterMember({"layer": core}, record={"name": "mine"}, kept_aside={"head": torch.ones(2)})
    assert load(member.to_bytes()).keys() == {"core.layer.coefficients_out", "kept.head"}  # as stores have them
    assert len({member.to_bytes() for _ in range(20)}) == 1


@pytest.mark.parametrize(
    "data", [b"", b"x" * 40, (1 << 40).to_bytes(8, "little") + b"{}", save({"a": torch.ones(1)})], ids=range(4)
)
def test_bytes_that_are_no_member_are_one_error(store, tmp_path, data):
    store.save_pretrained(tmp_path / "store")
    store._records.append("bad", data)
    with pytest.raises(ArtifactError, match="The member 'bad' of the store cannot be read"):
        AdapterStore.from_pretrained(tmp_path / "store")["bad"]


def size_without_card(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "README.md")


def test_remove_rename_and_compact(store, tmp_path):
    store.save_pretrained(tmp_path / "store")
    other = AdapterStore.from_pretrained(tmp_path / "store")  # another reader, opened before the changes
    kept = {name: store[name] for name in ("adapter-0", "partial")}
    store.add(tmp_path / "adapters" / "adapter-3", name="again")
    for name in ("adapter-1", "adapter-2", "adapter-3", "adapter-4"):
        store.remove(name)
    store.rename("partial", "a part")
    assert store.names == ("adapter-0", "a part", "again")
    assert store.member("a part")["name"] == "a part"
    before = size_without_card(tmp_path / "store")
    freed = store.compact()
    assert freed == before - size_without_card(tmp_path / "store") > 0
    assert len(list((tmp_path / "store" / "members").iterdir())) == 1
    assert same(other["adapter-0"], kept["adapter-0"])  # finds the new place by itself
    opened = AdapterStore.from_pretrained(tmp_path / "store")
    assert opened.names == store.names
    assert same(opened["a part"], kept["partial"])
    for call, error, message in (
        (lambda: store.remove("nobody"), KeyError, "'nobody' is not in the store"),
        (lambda: store.rename("nobody", "x"), KeyError, "'nobody' is not in the store"),
        (lambda: store.rename("a part", "again"), SubspaceError, "'again' is in the store already"),
        (lambda: store.rename("a part", "__base__"), SubspaceError, "cannot be the name of a member"),
        (lambda: store.add(tmp_path / "adapters" / "adapter-0"), SubspaceError, "'adapter-0' is in the store already"),
        (lambda: store.add(tmp_path / "adapters"), SubspaceError, "holds 6 adapters"),
        (lambda: store.add(tmp_path / "adapters" / "nowhere"), CollectionError, "nowhere"),
        (lambda: store.add(3), SubspaceError, "not a int"),
    ):
        with pytest.raises(error, match=message):
            call()
    store.add(tmp_path / "adapters" / "adapter-1", name="adapter-0", replace=True)
    assert same(store["adapter-0"], AdapterStore.from_pretrained(tmp_path / "store")["adapter-0"])
    assert not torch.equal(store["adapter-0"]["layer.0.query"].dense(), kept["adapter-0"]["layer.0.query"].dense())


def test_members_come_from_other_stores_of_the_same_bases(store, tmp_path):
    store.save_pretrained(tmp_path / "store")
    other = AdapterStore(store.subspace)
    other.add(store["adapter-1"])
    other.add(f"{tmp_path / 'store'}#adapter-2", name="two")
    assert other.names == ("adapter-1", "two")
    assert same(other["two"], store["adapter-2"])
    foreign = AdapterStore(store.subspace.truncate(3))
    with pytest.raises(SubspaceError, match=r"Move that store to these bases first, with rebase\(\)"):
        foreign.add(store["adapter-1"])


def test_an_existing_store_is_never_replaced(store, tmp_path):
    store.save_pretrained(tmp_path / "store")
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    with pytest.raises(ArtifactError, match="holds another store; choose a new folder"):
        AdapterStore(store.subspace).save_pretrained(tmp_path / "store")
    assert before == {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    store.save_pretrained(tmp_path / "store")  # the same store: nothing to do but the card
    assert before.keys() == {path for path in (tmp_path / "store").rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["low_rank", "full", "diagonal", "mixture"])
def test_rebase_is_exact_where_the_span_grows_and_measured_where_not(made, store, kind):
    with AdapterCollection.from_pretrained(made.folder) as collection:
        wide = SubspaceBuilder(n_components=9).fit(collection).subspace_
    module = "layer.0.value"
    core = store["adapter-0"][module]
    if kind == "mixture":
        core = Core(kind, {"weights": torch.tensor([0.3, -1.0]), "cores": torch.randn(2, 5, 5)}, 0.7)
    elif kind != "low_rank":
        core = Core(kind, core.to(kind).parts, 0.7)
    original = AdapterStore(
        wide.truncate(5), members={"one": AdapterMember({module: core}, kept_aside={"head": torch.ones(2)})}
    )
    grown = original.rebase(wide)
    old, new = (
        lora_B.double() @ lora_A.double()
        for lora_B, lora_A in (s.factors("one", module=module) for s in (original, grown))
    )
    torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-5)
    assert grown["one"][module].kind == kind
    assert torch.equal(grown["one"].kept_aside["head"], torch.ones(2))
    assert grown["one"].relative_errors[module] < 1e-5
    smaller = grown.rebase(wide.truncate(2))
    lora_B, lora_A = smaller.factors("one", module=module)
    error = torch.linalg.norm(new - lora_B.double() @ lora_A.double()) / torch.linalg.norm(new)
    assert smaller["one"].relative_errors[module] == pytest.approx(float(error), rel=1e-3)
    with pytest.raises(SubspaceError, match="has no bases of the same shape for 'layer.0.value'"):
        original.rebase(PrincipalSubspace({"layer.0.query": wide["layer.0.query"]}))


def test_a_store_of_format_1_is_brought_up_by_compact(tmp_path):
    saved = Path(__file__).parents[2] / "data" / "format_1" / "store"
    shutil.copytree(saved, tmp_path / "store")
    old = AdapterStore.from_pretrained(tmp_path / "store")
    before = {name: old[name] for name in old}
    with pytest.raises(
        ArtifactError, match=r"is of format 1, which cannot be changed member by member; call compact\(\)"
    ):
        old.remove("adapter-0")
    old.compact()
    assert not (tmp_path / "store" / "store.safetensors").exists()
    new = AdapterStore.from_pretrained(tmp_path / "store")
    assert all(same(new[name], member) for name, member in before.items())
    assert PrincipalSubspace.from_pretrained(tmp_path / "store") == old.subspace
    new.remove("adapter-0")
    assert old.refresh()
    assert old.names == ("adapter-1", "adapter-2")


FORMAT_1_DAMAGE = {
    "width": lambda t, c: t.update({Q: t[Q][:, :3]}),
    "int": lambda t, c: t.update({Q: t[Q].int()}),
    "gone": lambda t, c: t.pop(Q),
    "rows missing": lambda t, c: t.update({Q: t[Q][:2]}),
    "NaN": lambda t, c: t.update({Q: t[Q] * float("nan")}),
    "offsets NaN": lambda t, c: t.update(row_offsets=t["row_offsets"].double() * float("nan")),
    "offsets reversed": lambda t, c: t.update(row_offsets=t["row_offsets"].flip(1)),
    "offsets 1e12": lambda t, c: t["row_offsets"][:, -1:].fill_(10**12),
    "offsets shifted": lambda t, c: t.update(row_offsets=t["row_offsets"].clamp(min=1)),
    "members text": lambda t, c: c.update(members="abc"),
    "members alike": lambda t, c: c.update(members=[c["members"][0]] * 3),
    "members few": lambda t, c: c.update(members=c["members"][:2]),
    "errors": lambda t, c: t.update(relative_errors=t["relative_errors"][:1]),
}
Q = "bert.encoder.layer.0.attention.self.query.coefficients_in"


@pytest.mark.parametrize("damage", FORMAT_1_DAMAGE)
def test_a_damaged_store_of_format_1_is_one_error(tmp_path, damage):
    shutil.copytree(Path(__file__).parents[2] / "data" / "format_1" / "store", tmp_path / "store")
    file, config = tmp_path / "store" / "store.safetensors", tmp_path / "store" / "store_config.json"
    tensors, settings = load_file(file), json.loads(config.read_text())
    FORMAT_1_DAMAGE[damage](tensors, settings)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    config.write_text(json.dumps(settings))
    with pytest.raises(ArtifactError, match="does not fit its config|cannot be read"):
        export_lora(AdapterStore.from_pretrained(tmp_path / "store"), tmp_path / "lora", adapter_name="adapter-1")
    assert not (tmp_path / "lora").exists()


def test_the_old_name_still_works_and_names_the_new_one():
    for place in (eigenpeft, eigenpeft.subspace, eigenpeft.subspace.stores.store):
        with pytest.warns(DeprecationWarning, match=r"use eigenpeft\.AdapterStore"):
            assert place.CoefficientStore is AdapterStore


def test_modules_outside_the_subspace_are_an_error(made, store, tmp_path):
    write_adapter(tmp_path / "other", random_factors(modules={"layer.7.query": (12, 20)}))
    with (
        AdapterCollection.from_pretrained(tmp_path / "other") as collection,
        pytest.raises(
            SubspaceError, match="1 of the 1 adapted modules are not in the subspace, such as 'layer.7.query'"
        ),
    ):
        AdapterStore.from_collection(store.subspace, collection)


def test_untrained_adapters_are_reproduced_exactly(store, tmp_path):
    zero = {name: (torch.zeros_like(B), A) for name, (B, A) in random_factors().items()}
    write_adapter(tmp_path / "untrained", zero)
    with AdapterCollection.from_pretrained(tmp_path / "untrained") as collection:
        projected = AdapterStore.from_collection(store.subspace, collection)
    assert {error for row in projected.relative_errors.values() for error in row.values()} == {0.0}


def test_a_folder_of_several_adapters_is_not_one_member(tmp_path):
    made = make_collection(tmp_path, n_adapters=3)
    store = AdapterStore(SubspaceBuilder(4).fit(AdapterCollection.from_pretrained(made.folder)).subspace_)
    with pytest.raises(
        SubspaceError, match=r"holds 3 adapters, .*; add them one by one, or use AdapterStore.from_coll"
    ):
        store.add(made.folder)


def test_a_file_without_coefficients_is_not_a_member(tmp_path):
    base = torch.nn.Sequential(torch.nn.Linear(8, 6))
    ones = torch.ones(3)
    bases = eigenpeft.subspace.ModuleSubspace(
        torch.eye(3, 8),
        torch.eye(3, 6),
        singular_values_in=ones,
        singular_values_out=ones,
        explained_variance_ratio=ones / 3,
    )
    subspace = PrincipalSubspace({"0": bases})
    get_peft_model(base, EigenLoraConfig(subspace=subspace, r=2)).save_pretrained(tmp_path / "mine")
    save_file({"base_model.model.head.weight": torch.ones(2, 6)}, tmp_path / "mine" / "adapter_model.safetensors")
    with pytest.raises(SubspaceError, match="'mine' has no coefficients in its file; save it again"):
        AdapterStore(subspace).add(tmp_path / "mine")
