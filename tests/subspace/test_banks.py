"""Banks that several modules share, and banks with different numbers of components on their two sides."""

import json

import pytest
import torch

from eigenpeft import PrincipalSubspace, SubspaceBuilder
from eigenpeft.errors import ArtifactError, SubspaceError
from eigenpeft.subspace import ModuleSubspace, random_subspace, shuffled_subspace
from tests.subspace.conftest import random_bases


@pytest.fixture
def shared():
    """Two modules of one bank, one of its own; in_features 20, out_features 12."""
    one = random_bases(6, 20, 12)
    return PrincipalSubspace({"layer.0": one, "layer.1": random_bases(4, 20, 12, seed=1), "layer.2": one})


def test_a_shared_bank_is_kept_once_in_memory_and_on_disk(shared, tmp_path):
    assert shared.bank_of == {"layer.0": "layer.0", "layer.1": "layer.1", "layer.2": "layer.0"}
    assert list(shared.banks) == ["layer.0", "layer.1"]
    assert not any(name.startswith("layer.2") for name in shared.tensors())
    shared.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "subspace_config.json").read_text())
    assert (config["format_version"], config["shared_banks"]) == (2, {"layer.2": "layer.0"})
    loaded = PrincipalSubspace.from_pretrained(tmp_path, fingerprint=shared.fingerprint)
    assert loaded.modules == shared.modules
    assert loaded["layer.2"] is loaded["layer.0"]
    assert torch.equal(loaded["layer.2"].components_in, shared["layer.0"].components_in)


def test_who_shares_a_bank_is_in_the_fingerprint(shared):
    copies = PrincipalSubspace({name: ModuleSubspace(**bank.tensors()) for name, bank in shared.items()})
    swapped = PrincipalSubspace(dict(shared) | {"layer.2": shared["layer.1"]})
    assert len({subspace.fingerprint for subspace in (shared, copies, swapped)}) == 3
    assert len(copies.banks) == 3


def test_truncation_and_controls_keep_what_is_shared(shared):
    for other in (shared.truncate(3), shared.truncate((3, 2)), random_subspace(like=shared)):
        assert other.bank_of == shared.bank_of
    found = shuffled_subspace(PrincipalSubspace(dict(shared) | {"layer.1": random_bases(6, 20, 12, seed=1)}))
    assert torch.equal(found["layer.2"].components_in, random_bases(6, 20, 12, seed=1).components_in)
    assert torch.equal(found["layer.1"].components_in, shared["layer.0"].components_in)
    with pytest.raises(SubspaceError, match="2 banks, such as that of 'layer.0', are the only ones of their shape"):
        shuffled_subspace(shared)


@pytest.mark.parametrize(
    "banks",
    [
        {"layer.2": "layer.9"},
        {"layer.9": "layer.0"},
        {"layer.2": "layer.2"},
        {"layer.2": "layer.1", "layer.1": "layer.0"},
    ],
)
def test_a_config_that_shares_what_there_is_not_is_refused(shared, tmp_path, banks):
    shared.save_pretrained(tmp_path)
    path = tmp_path / "subspace_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shared_banks": banks}))
    with pytest.raises(ArtifactError, match="share a bank that no other"):
        PrincipalSubspace.from_pretrained(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shared_banks": [1]}))
    with pytest.raises(ArtifactError, match="shared_banks that are not a table"):
        PrincipalSubspace.from_pretrained(tmp_path)


def test_another_bank_than_saved_is_refused(shared, tmp_path):
    shared.save_pretrained(tmp_path)
    path = tmp_path / "subspace_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shared_banks": {"layer.2": "layer.1"}}))
    with pytest.raises(ArtifactError, match="have fingerprint .* a file was altered"):
        PrincipalSubspace.from_pretrained(tmp_path)


def test_adapters_cannot_be_added_to_shared_or_unequal_banks(shared, tmp_path):
    builder = SubspaceBuilder.from_subspace(shared)
    with pytest.raises(SubspaceError, match="1 of the subspace's 3 modules share the bank of another one"):
        builder._check_addition(None)  # pyright: ignore[reportArgumentType] (refused before it is read)


def test_sides_may_differ(tmp_path):
    bank = random_bases(6, 20, 12).truncate((5, 3))
    subspace = PrincipalSubspace({"layer.0": bank})
    assert (bank.n_components_in, bank.n_components_out, bank.n_components) == (5, 3, 5)
    assert "n_components=3..5" in repr(subspace)
    assert "5 (in), 3 (out)" in subspace.card()
    subspace.save_pretrained(tmp_path)
    assert PrincipalSubspace.from_pretrained(tmp_path) == subspace
    # What the longer side adds beyond the shorter was not measured.
    whole = random_bases(6, 20, 12).explained_variance_ratio
    torch.testing.assert_close(bank.explained_variance_ratio, torch.cat([whole[:3], torch.zeros(2)]))
    assert torch.equal(bank.truncate(2).explained_variance_ratio, whole[:2])
    assert (bank.truncate(4).n_components_in, bank.truncate(4).n_components_out) == (4, 3)
    lora_B, lora_A = torch.randn(12, 2), torch.randn(2, 20)
    found = subspace.project({"layer.0": (lora_B, lora_A)})
    B, A = subspace.reconstruct(found)["layer.0"]
    P_out, P_in = (rows.mT @ rows for rows in (bank.components_out, bank.components_in))
    torch.testing.assert_close(B @ A, P_out @ lora_B @ lora_A @ P_in, rtol=1e-4, atol=1e-5)
    random = random_subspace(like=subspace)["layer.0"]
    assert (random.n_components_in, random.n_components_out) == (5, 3)


@pytest.mark.parametrize("asked", [(7, 3), (0, 3), 7, 0, (3, 3, 3)])
def test_more_components_than_there_are_is_refused(asked):
    with pytest.raises(SubspaceError, match=r"n_components=.* must be between 1 and the 6 components"):
        random_bases(6, 20, 12).truncate(asked)


def test_pseudo_components_of_sides_that_differ():
    bank = random_bases(6, 20, 12, n_pseudo=2)
    cut = bank.truncate((6, 5))
    assert (cut.n_components_in, cut.n_components_out, cut.n_pseudo_components) == (6, 5, 2)
    assert torch.equal(cut.explained_variance_ratio, bank.explained_variance_ratio)
