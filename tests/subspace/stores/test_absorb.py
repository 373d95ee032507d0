"""absorb: nothing old changes while the subspace grows, losses are those of dense matrices, and stops lose nothing."""

import json
import shutil

import pytest
import torch

from eigenpeft import AdapterCollection, AdapterStore, PrincipalSubspace, SubspaceBuilder
from eigenpeft.errors import ArtifactError, SubspaceError
from eigenpeft.subspace import AdapterMember, Core
from eigenpeft.subspace.lineage import is_entry
from tests.factories import MODULES, make_collection, random_factors, write_adapter


@pytest.fixture
def made(tmp_path):
    """Five adapters that share directions, a store of them, and two new ones with directions of their own."""
    made = make_collection(tmp_path / "adapters", rank=(4, 2), n_shared=6, noise=0.3)
    for number in range(2):
        write_adapter(tmp_path / "new" / f"new-{number}", random_factors(rank=2 + number, seed=70 + number))
    return made


@pytest.fixture
def store(made, tmp_path):
    with AdapterCollection.from_pretrained(made.folder) as collection:
        subspace = SubspaceBuilder(n_components=5).fit(collection).subspace_
        store = AdapterStore.from_collection(subspace, collection)
    store.save_pretrained(tmp_path / "store")
    return store


def updates(store, name):
    return {
        module: lora_B.double() @ lora_A.double()
        for module in store[name]
        for lora_B, lora_A in [store.factors(name, module=module)]
    }


def test_the_subspace_grows_and_no_member_changes(store, tmp_path):
    before = {name: store._records.read(name) for name in store}
    factors = {name: {module: store.factors(name, module=module) for module in store[name]} for name in store}
    old = store.subspace
    report = store.absorb(tmp_path / "new", held_share=1.0)
    assert report.is_exact
    assert report.absorbed == ("new-0", "new-1")
    assert set(report.n_components.values()) == {((5, 5), (10, 10))}
    assert (report.fingerprint_before, report.fingerprint_after) == (old.fingerprint, store.subspace.fingerprint)
    assert 0 < report.held_before < 0.9 < 0.999 < report.held_after
    for opened in (store, AdapterStore.from_pretrained(tmp_path / "store")):
        assert opened.names == (*before, "new-0", "new-1")
        assert opened.subspace != old
        for name, data in before.items():
            assert opened._records.read(name) == data
            for module, pair in factors[name].items():
                # What is served, merged and exported is bit for bit what it was.
                assert all(torch.equal(*both) for both in zip(opened.factors(name, module=module), pair, strict=True))
    for name in report.absorbed:
        assert max(store[name].relative_errors.values()) < 1e-5
        assert report.errors[name] < 1e-5
        for module, update in updates(store, name).items():
            lora_B, lora_A = random_factors(rank=2 + int(name[-1]), seed=70 + int(name[-1]))[module]
            expected = lora_B.double() @ lora_A.double()
            scale = torch.linalg.norm(update) / torch.linalg.norm(expected)
            torch.testing.assert_close(update, scale * expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_share_takes_fewer_and_says_what_is_lost(store, tmp_path):
    report = store.absorb(tmp_path / "new", held_share=0.8)
    counts = [after[0] for _, after in report.n_components.values()]
    assert all(5 < count < 10 for count in counts)
    held = [1 - error**2 for name in report.absorbed for error in store[name].relative_errors.values()]
    assert sum(held) / len(held) == pytest.approx(report.held_after, abs=1e-5)
    assert report.held_after >= 0.8
    assert report.errors["new-0"] == pytest.approx(
        sum(store["new-0"].relative_errors.values()) / len(store["new-0"]), abs=1e-9
    )


def test_a_second_time_nothing_grows(store, tmp_path):
    store.absorb(tmp_path / "new", held_share=1.0)
    before = store.subspace
    shutil.copytree(tmp_path / "new" / "new-0", tmp_path / "again")
    report = store.absorb(tmp_path / "again", held_share=1.0)
    assert all(before == after for before, after in report.n_components.values())
    assert store.subspace == before
    assert report.held_before == pytest.approx(1.0, abs=1e-5)


def test_the_earlier_subspace_comes_out_with_its_fingerprint(store, tmp_path):
    first = store.subspace
    store.absorb(tmp_path / "new" / "new-0", held_share=1.0)
    second = store.subspace
    store.absorb(tmp_path / "new" / "new-1", held_share=0.5)
    opened = PrincipalSubspace.from_pretrained(tmp_path / "store", fingerprint=first.fingerprint)
    assert opened == first
    assert opened.info.sources == first.info.sources
    assert store.subspace.earlier(second.fingerprint) == second
    assert store.subspace.earlier(second.fingerprint).earlier(first.fingerprint) == first
    assert store.subspace.earlier("0" * 64) is None
    with pytest.raises(ArtifactError, match="another subspace, or another revision"):
        PrincipalSubspace.from_pretrained(tmp_path / "store", fingerprint="0" * 64)


def test_members_of_the_earlier_bases_still_fit(store, tmp_path):
    shutil.copytree(tmp_path / "store", tmp_path / "earlier")
    store.absorb(tmp_path / "new", held_share=1.0)
    store.add(f"{tmp_path / 'earlier'}#adapter-0", name="copy")
    assert all(torch.equal(store["copy"][m].dense(), store["adapter-0"][m].dense()) for m in store["copy"])


def test_modules_that_the_subspace_lacks_get_banks(store, tmp_path):
    more = {**MODULES, "layer.9.query": MODULES["layer.0.query"]}
    write_adapter(tmp_path / "more", random_factors(modules=more, rank=2, seed=5))
    old = store.subspace
    report = store.absorb(tmp_path / "more", held_share=1.0)
    assert report.n_components["layer.9.query"] == ((0, 0), (2, 2))
    assert max(store["more"].relative_errors.values()) < 1e-5
    assert PrincipalSubspace.from_pretrained(tmp_path / "store", fingerprint=old.fingerprint) == old


@pytest.mark.parametrize("kind", ["low_rank", "full", "diagonal", "mixture"])
def test_within_a_bound_losses_are_those_of_the_updates(store, tmp_path, kind):
    if kind != "low_rank":
        for name in store.names:
            member = store[name]
            cores = {module: core.to(kind) for module, core in member.items()}
            store.add(AdapterMember(cores, record=member.record), name=name, replace=True)
    before = {name: updates(store, name) for name in store}
    errors = store.relative_errors
    report = store.absorb(tmp_path / "new", max_components=6)
    assert set(report.n_components.values()) == {((5, 5), (6, 6))}
    assert not report.is_exact
    for name, old in before.items():
        after = updates(store, name)
        difference = sum(float((old[m] - after[m]).norm()) ** 2 for m in old) ** 0.5
        total = sum(float(old[m].norm()) ** 2 for m in old) ** 0.5
        assert report.lost[name] == pytest.approx(difference / total, rel=1e-3)
        assert 0.01 < report.lost[name] < 1
        for module in old:
            own = float((old[module] - after[module]).norm() / old[module].norm())
            expected = min(1.0, errors[module].get(name, 0.0) + own)
            assert store[name].relative_errors[module] == pytest.approx(expected, abs=1e-4)
    opened = AdapterStore.from_pretrained(tmp_path / "store")
    assert opened.names == (*before, "new-0", "new-1")
    for bank in opened.subspace.values():
        gram = bank.components_in.double() @ bank.components_in.double().mT
        torch.testing.assert_close(gram, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)


def test_within_a_bound_the_bases_are_better_than_the_old_ones_and_others(store, made, tmp_path):
    """The control: the old bases hold less of everybody's updates than those fitted anew with one more component."""
    wanted = {name: updates(store, name) for name in store}
    with AdapterCollection.from_pretrained(tmp_path / "new") as collection:
        wanted |= {
            name: {
                m: f.lora_B.double() @ f.lora_A.double()
                for m in collection.modules
                for f in collection.factors(m, names=[name])
            }
            for name in collection.names
        }

    def held(subspace):
        shares = [
            float((bank.components_out.double() @ update @ bank.components_in.double().mT).norm() / update.norm()) ** 2
            for each in wanted.values()
            for module, update in each.items()
            for bank in [subspace[module]]
        ]
        return sum(shares) / len(shares)

    old = held(store.subspace)
    store.absorb(tmp_path / "new", max_components=6)
    generator = torch.Generator().manual_seed(0)
    bank = store.subspace["layer.0.query"]
    random = torch.linalg.qr(torch.randn(bank.in_features, 6, generator=generator))[0]
    assert random.shape[1] == 6
    assert held(store.subspace) > old + 0.02


def test_a_store_in_memory_absorbs_too(made, tmp_path):
    with AdapterCollection.from_pretrained(made.folder) as collection:
        store = AdapterStore.from_collection(SubspaceBuilder(n_components=5).fit(collection).subspace_, collection)
    store.absorb([tmp_path / "new" / "new-0", tmp_path / "new" / "new-1"], held_share=1.0)
    assert store.names[-2:] == ("new-0", "new-1")
    assert max(store["new-1"].relative_errors.values()) < 1e-5


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (None, {"held_share": 0.0}, SubspaceError, r"held_share=0.0 must be in \(0, 1\]"),
        (None, {"max_components": 0}, SubspaceError, "max_components=0 must be a whole number of at least 1"),
        ("name", {}, SubspaceError, "'adapter-0' is in the store already"),
        ("shape", {}, SubspaceError, r"Cannot absorb 'layer\.0\.query' of shape"),
        ("base", {}, SubspaceError, "names the base model 'other/base'"),
        ("nan", {}, Exception, "NaN"),
    ],
)
def test_bad_input_changes_nothing(store, tmp_path, change, options, error, message):
    folder = tmp_path / "new" / "new-0"
    if change == "name":
        folder = shutil.copytree(folder, tmp_path / "taken" / "adapter-0")
    if change == "shape":
        write_adapter(tmp_path / "odd", random_factors(modules={"layer.0.query": (3, 5)}, rank=1, seed=1))
        folder = tmp_path / "odd"
    if change == "base":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other/base"}))
    if change == "nan":
        factors = random_factors(rank=2, seed=1)
        next(iter(factors.values()))[0][0, 0] = float("nan")
        write_adapter(tmp_path / "odd", factors)
        folder = tmp_path / "odd"
    files = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        store.absorb(folder, **options)
    assert files == {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert store.names == tuple(AdapterStore.from_pretrained(tmp_path / "store"))


def test_who_opened_the_store_before_reads_the_old_members_and_can_refresh(store, tmp_path):
    other = AdapterStore.from_pretrained(tmp_path / "store")
    core = Core("full", {"coefficients_out": torch.ones(5, 5)})
    store.absorb(tmp_path / "new", held_share=1.0)
    assert torch.equal(other["adapter-0"]["layer.0.query"].dense(), store["adapter-0"]["layer.0.query"].dense())
    with pytest.raises(ArtifactError, match=r"another process gave it other bases\. Call refresh\(\)"):
        other.add(AdapterMember({"layer.0.query": core}), name="mine")
    assert other.refresh()
    other.add(AdapterMember({"layer.0.query": core}), name="mine")
    assert other.subspace == store.subspace
    assert store.refresh()
    assert "mine" in store


def test_who_opened_the_store_before_never_reads_cores_of_other_bases(store, tmp_path):
    other = AdapterStore.from_pretrained(tmp_path / "store")
    store.absorb(tmp_path / "new", max_components=5)
    with pytest.raises(ArtifactError, match=r"written with other bases since it was opened\. Call refresh\(\)"):
        other["adapter-0"]
    other.refresh()
    assert torch.equal(other["adapter-0"]["layer.0.query"].dense(), store["adapter-0"]["layer.0.query"].dense())


def test_no_lock_is_left_and_the_folder_can_still_be_replaced(store, tmp_path):
    store.add(AdapterMember({"layer.0.query": Core("full", {"coefficients_out": torch.ones(5, 5)})}), name="mine")
    store.absorb(tmp_path / "new")
    assert not list(tmp_path.rglob(".*.lock"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".store")]
    store.remove("mine")
    AdapterStore(store.subspace).save_pretrained(tmp_path / "store", overwrite=True)


@pytest.mark.parametrize(
    "entry", [1, {}, {"sha256": "0", "n_modules": -1, "n_sources": 0, "sizes": [[1] * 4]}, {"sha256": "0", "sizes": []}]
)
def test_a_lineage_that_no_version_writes_is_one_error(store, tmp_path, entry):
    assert not is_entry(entry)
    config = tmp_path / "store" / "subspace_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "grown_from": [entry]}))
    with pytest.raises(ArtifactError, match="grown_from="):
        AdapterStore.from_pretrained(tmp_path / "store")


def test_a_lock_that_a_killed_process_left_is_no_hindrance(store, tmp_path):
    lock = tmp_path / "store" / ".members.index.lock"
    lock.touch()
    store.absorb(tmp_path / "new")
    assert not lock.exists()
    lock.touch()
    AdapterStore(store.subspace).save_pretrained(tmp_path / "store", overwrite=True)
    assert len(AdapterStore.from_pretrained(tmp_path / "store")) == 0
    assert not lock.exists()


def test_the_same_again_with_replace_changes_nothing(store, tmp_path):
    store.absorb(tmp_path / "new", held_share=1.0)
    before = {name: store._records.read(name) for name in store}
    info = store.subspace.info
    store.absorb(tmp_path / "new", held_share=1.0, replace=True)
    assert {name: store._records.read(name) for name in store} == before
    assert store.subspace.info == info


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_members_that_have_gone_do_not_stop_it(store, made, tmp_path, how):
    store = AdapterStore.from_pretrained(tmp_path / "store")
    first, second = store.names[:2]
    store.add(tmp_path / "new" / "new-1", name="passing")
    if how == "removed":
        store.remove("passing")
    else:
        store.add(tmp_path / "new" / "new-0", name="passing", replace=True)
    kept = {name: store._records.read(name) for name in (first, second)}
    store.absorb(tmp_path / "new" / "new-0", held_share=1.0)
    again = AdapterStore.from_pretrained(tmp_path / "store")
    assert again.names == store.names
    assert {name: again._records.read(name) for name in kept} == kept
    assert len(list((tmp_path / "store" / "members").iterdir())) <= len(again.names)


def test_a_file_that_no_index_names_stops_it(store, tmp_path):
    store = AdapterStore.from_pretrained(tmp_path / "store")
    (tmp_path / "store" / "members" / "0123456789abcdef.shard").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="holds files that eigenpeft did not write: members/0123456789abcdef.shard"):
        store.absorb(tmp_path / "new" / "new-0")
    assert (tmp_path / "store" / "members" / "0123456789abcdef.shard").read_bytes() == b"mine"
