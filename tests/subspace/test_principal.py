"""PrincipalSubspace: exact round trips, truncation by views, project and reconstruct, refusals."""

import json

import pytest
import torch

from eigenpeft import PrincipalSubspace
from eigenpeft.errors import ArtifactError, SubspaceError, SubspaceNotFoundError
from eigenpeft.subspace import ModuleSubspace, SubspaceInfo
from tests.subspace.conftest import random_bases


def test_save_and_load_are_exact(subspace, tmp_path):
    subspace.save_pretrained(tmp_path / "s")
    loaded = PrincipalSubspace.from_pretrained(tmp_path / "s", fingerprint=subspace.fingerprint)
    assert loaded.modules == subspace.modules
    assert loaded.info == subspace.info
    assert loaded == subspace
    assert all(torch.equal(tensor, loaded.tensors()[name]) for name, tensor in subspace.tensors().items())
    assert loaded.origin == str(tmp_path / "s")
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        "subspace_config.json",
        "subspace.safetensors",
        "README.md",
        ".eigenpeft.json",
    }


def test_saving_twice_gives_the_same_bytes(subspace, tmp_path):
    for name in ("a", "b"):
        subspace.save_pretrained(tmp_path / name)
    for file in ("subspace.safetensors", "subspace_config.json", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_fingerprint_sees_every_tensor(subspace):
    for field in ("components_in", "singular_values_out", "explained_variance_ratio"):
        tensors = {name: tensor.clone() for name, tensor in subspace.tensors().items()}
        tensors[f"layer.1.query.{field}"].view(-1)[-1] += 1e-6
        other = PrincipalSubspace.from_tensors(tensors, modules=subspace.modules, info=subspace.info)
        assert other.fingerprint != subspace.fingerprint


@pytest.mark.parametrize("position", [0.3, 0.6, 0.95])
def test_a_flipped_byte_is_refused(subspace, tmp_path, position):
    subspace.save_pretrained(tmp_path)
    path = tmp_path / "subspace.safetensors"
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + int(position * (len(data) - header))] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="a file was altered"):
        PrincipalSubspace.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -10])
def test_a_truncated_file_is_refused(subspace, tmp_path, keep):
    subspace.save_pretrained(tmp_path)
    path = tmp_path / "subspace.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        PrincipalSubspace.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version 99; this version of eigenpeft reads 1 to 2"),
        ({"format_version": None}, "format_version None"),
        ({"modules": ["layer.0.query"]}, "0 tensors missing .*5 unexpected"),
        ({"modules": 3}, "lists no modules"),
        ({"sha256": "f" * 64}, "a file was altered"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(subspace, tmp_path, change, message):
    subspace.save_pretrained(tmp_path)
    path = tmp_path / "subspace_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=message):
        PrincipalSubspace.from_pretrained(tmp_path)


def test_a_config_that_is_not_json_is_refused(subspace, tmp_path):
    subspace.save_pretrained(tmp_path)
    (tmp_path / "subspace_config.json").write_text("[")
    with pytest.raises(ArtifactError, match=r"cannot be read as JSON \(.*get a fresh copy of the subspace"):
        PrincipalSubspace.from_pretrained(tmp_path)


def test_another_fingerprint_than_asked_for_is_refused(subspace, tmp_path):
    subspace.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="is asked for: it is another subspace"):
        PrincipalSubspace.from_pretrained(tmp_path, fingerprint="f" * 64)


def test_a_missing_place_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SubspaceNotFoundError, match=r"Looked for a local folder \(from '.*'\), then on the Hub"):
        PrincipalSubspace.from_pretrained("nobody/nothing", local_files_only=True)
    with pytest.raises(SubspaceNotFoundError, match="Check the spelling"):
        PrincipalSubspace.from_pretrained("../../x/y/z")


def test_a_folder_of_something_else_is_refused(tmp_path, subspace):
    with pytest.raises(ArtifactError, match="is not a subspace or adapter store"):
        PrincipalSubspace.from_pretrained(tmp_path)
    subspace.save_pretrained(tmp_path)
    (tmp_path / "subspace.safetensors").unlink()
    with pytest.raises(ArtifactError, match="incomplete: it has no subspace.safetensors"):
        PrincipalSubspace.from_pretrained(tmp_path)


def test_truncation_takes_the_first_components_as_views(subspace):
    small = subspace.truncate(3)
    for name, bases in small.items():
        assert bases.n_components == 3
        assert bases.components_in.data_ptr() == subspace[name].components_in.data_ptr()
    assert small["layer.1.query"].n_pseudo_components == 0
    assert subspace["layer.1.query"].n_pseudo_components == 1
    assert subspace.truncate(100)["layer.1.query"].n_components == 5
    with pytest.raises(SubspaceError, match="n_components=0 must be between 1 and the 6"):
        subspace.truncate(0)


def test_project_then_reconstruct_is_the_projection(subspace):
    bases = subspace["layer.0.query"]
    lora_B, lora_A = torch.randn(12, 4), torch.randn(4, 20)
    coefficients = subspace.project({"layer.0.query": (lora_B, lora_A)})
    assert coefficients["layer.0.query"].coefficients_in.shape == (4, 6)
    assert coefficients["layer.0.query"].coefficients_out.shape == (6, 4)
    B, A = subspace.reconstruct(coefficients)["layer.0.query"]
    out, into = bases.components_out.double(), bases.components_in.double()
    expected = out.T @ out @ lora_B.double() @ lora_A.double() @ into.T @ into
    torch.testing.assert_close((B @ A).double(), expected, atol=1e-5, rtol=1e-5)
    again = subspace.project({"layer.0.query": (B, A)})["layer.0.query"]
    torch.testing.assert_close(again.coefficients_in, coefficients["layer.0.query"].coefficients_in)


def test_project_refuses_other_modules_and_shapes(subspace):
    with pytest.raises(SubspaceError, match="not in the subspace"):
        subspace.project({"elsewhere": (torch.zeros(12, 4), torch.zeros(4, 20))})
    with pytest.raises(SubspaceError, match="shape 13 x 20: it is 12 x 20 in the subspace"):
        subspace.project({"layer.0.query": (torch.zeros(13, 4), torch.zeros(4, 20))})


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("layer.0.query", "layer.0.query"),
        ("bert.encoder.layer.0.query", "layer.0.query"),
        ("0.query", "layer.0.query"),
        ("query", None),  # two fit
        ("xlayer.0.query", None),
        ("layer.2.query", None),
    ],
)
def test_find_matches_by_dotted_suffix_when_only_one_fits(subspace, name, found):
    assert subspace.find(name) == found


def test_wrong_shapes_are_refused():
    good = random_bases(3, 8, 6)
    with pytest.raises(SubspaceError, match="at most 3 and 2, and explained_variance_ratio"):
        ModuleSubspace(**{**good.tensors(), "components_out": good.components_out[:2]})
    with pytest.raises(SubspaceError, match=r"explained_variance_ratio \(2,\) as many as the longer"):
        ModuleSubspace(**{**good.tensors(), "explained_variance_ratio": good.explained_variance_ratio[:2]})
    with pytest.raises(SubspaceError, match="at least one module"):
        PrincipalSubspace({})


def test_unknown_module_names_an_example(subspace):
    with pytest.raises(KeyError, match="'q' is not in the subspace of 2 modules, such as 'layer.0.query'"):
        subspace["q"]


def test_card_is_complete_and_hostile_names_stay_in_their_cell(subspace, tmp_path):
    info = subspace.info.__class__(
        base_model_name_or_path="some/base",
        sources=(
            {"name": "../../x\n# owned | y", "source": "s", "licence": "cc-by-nc-4.0"},
            {"name": "b", "licence": "mit"},
        ),
    )
    card = PrincipalSubspace(dict(subspace), info=info).card()
    assert "| ../../x # owned &#124; y | s |" in card
    assert "Most restrictive license among them: **cc-by-nc-4.0**" in card
    assert "base_model: some/base" in card
    assert "library_name: eigenpeft" in card


def test_names_from_before_the_first_release_are_read():
    """`missed_energy_bound` and weighting "energy" in a config file."""
    info = SubspaceInfo.from_dict({"weighting": "energy", "missed_energy_bound": 0.25})
    assert (info.weighting, info.missed_share_bound) == ("none", 0.25)
