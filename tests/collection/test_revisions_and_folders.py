"""Revisions of a base model are base models of their own; adapters in folders below an adapter are named."""

import pytest

from eigenpeft import AdapterCollection, AdapterStore, SubspaceBuilder
from eigenpeft.errors import CollectionError, SubspaceError
from tests.factories import random_factors, write_adapter


def adapters(folder, *revisions):
    for i, revision in enumerate(revisions):
        write_adapter(folder / str(i), random_factors(seed=i), revision=revision, base_model_name_or_path="me/base")
    return folder


def test_two_revisions_are_two_base_models(tmp_path):
    folder = adapters(tmp_path, "step3000", "step3000", "step143000", None)
    with pytest.raises(
        CollectionError, match="'me/base at revision step3000' of '0', '1'; 'me/base at revision step143000'"
    ):
        AdapterCollection.from_pretrained(folder)
    assert len(AdapterCollection.from_pretrained(folder, allow_different_base_models=True)) == 4


def test_a_config_without_a_revision_contradicts_nobody(tmp_path):
    assert AdapterCollection.from_pretrained(adapters(tmp_path, "v1", None, "v1")).base_model_revision == "v1"
    assert AdapterCollection.from_pretrained(adapters(tmp_path / "x", None)).base_model_revision is None


def test_a_subspace_keeps_the_revision_and_its_store_asks_for_it(tmp_path):
    collection = AdapterCollection.from_pretrained(adapters(tmp_path / "first", "v1", "v1"))
    subspace = SubspaceBuilder(4).fit(collection).subspace_
    assert subspace.info.base_model_revision == "v1"
    assert ", revision `v1`. For each of" in subspace.card()
    assert [record["base_revision"] for record in subspace.info.sources] == ["v1", "v1"]
    store = AdapterStore.from_collection(subspace, collection)
    with pytest.raises(SubspaceError, match="names revision 'v2' of its base model, and the store's subspace 'v1'"):
        store.add(adapters(tmp_path / "second", "v2") / "0", name="other")


def test_adapters_below_an_adapter_are_a_finding(tmp_path):
    root = write_adapter(tmp_path / "saved", random_factors())
    for name in ("other", "checkpoint-5", ".hidden"):
        write_adapter(root / name, random_factors(seed=1))
    (finding,) = [each for each in AdapterCollection.from_pretrained(root).findings if each.kind == "adapters_below"]
    assert "1 adapters in folders below it were not read, 'other'" in finding.message
    both = AdapterCollection.from_pretrained([root, root / "other"])
    assert not [each for each in both.findings if each.kind == "adapters_below"]
