"""The recipe that builds a subspace and a store from adapter folders."""

from eigenpeft import AdapterStore, PrincipalSubspace


def test_it_leaves_a_subspace_and_a_store(recipe, adapters, tmp_path):
    printed = recipe("build_subspace", "--adapters", tmp_path / "adapters", "--n_components", 6, "--out", "recycled")
    store = AdapterStore.from_pretrained(tmp_path / "recycled" / "store")
    assert len(store) == 5
    assert all(f"{name}: relative error" in printed for name in store.names)
    subspace = PrincipalSubspace.from_pretrained(tmp_path / "recycled" / "subspace")
    assert all(subspace[module].n_components == 6 for module in subspace)
    assert (tmp_path / "recycled" / "subspace" / "README.md").is_file()
