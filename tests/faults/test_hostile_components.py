"""EigenLoRA adapters from elsewhere: nobody's components change, nothing of the reader's is opened, nothing is made of numbers."""

import copy
import gc
import json
import logging
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from eigenpeft import EigenLoraConfig, PrincipalSubspace
from eigenpeft.errors import AdapterConfigError, EigenPeftError
from eigenpeft.subspace import ModuleSubspace
from eigenpeft.tuners.layers import shared_bases

X = torch.ones(2, 20)
WIDTHS = {"0": (16, 20), "1": (12, 16)}
K = 4


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 12))


def subspace(seed):
    torch.manual_seed(seed)
    modules = {}
    for name, widths in WIDTHS.items():
        out_side, in_side = (torch.linalg.qr(torch.randn(width, K)).Q.mT.contiguous() for width in widths)
        modules[name] = ModuleSubspace(
            in_side,
            out_side,
            singular_values_in=torch.ones(K),
            singular_values_out=torch.ones(K),
            explained_variance_ratio=torch.full((K,), 1 / K),
        )
    return PrincipalSubspace(modules)


def trained(bases, folder, *, seed=1, dtype=None, **settings):
    model = get_peft_model(base(), EigenLoraConfig(subspace=bases, r=2, **settings))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.to(dtype or torch.float32).save_pretrained(folder)
    return model.eval()(X.to(dtype or torch.float32)).detach()


def load(folder):
    gc.collect()  # a subspace that is still in memory would be found by its fingerprint
    return PeftModel.from_pretrained(base(), folder).eval()


def edit(folder, **change):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return folder


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in change(load_file(path)).items()}, path, metadata={"format": "pt"})


@pytest.fixture
def honest(tmp_path):
    """An adapter with embedded components, and its outputs."""
    return tmp_path / "honest", trained(subspace(0), tmp_path / "honest")


@pytest.mark.parametrize("claim", ["the same fingerprint", "none"])
@pytest.mark.parametrize("first", ["honest", "other"])
def test_components_of_one_adapter_are_never_anothers(tmp_path, honest, claim, first):
    folder, expected = honest
    expected_other = trained(subspace(50), tmp_path / "other", seed=2)
    fingerprint = json.loads((folder / "adapter_config.json").read_text())["subspace_sha256"]
    edit(tmp_path / "other", subspace_sha256=fingerprint if claim == "the same fingerprint" else None)
    second = "other" if first == "honest" else "honest"
    model = load(tmp_path / first)
    model.load_adapter(tmp_path / second, second)
    outputs = {}
    for name, adapter in ((first, "default"), (second, second)):
        model.set_adapter(adapter)
        outputs[name] = model(X)
    torch.testing.assert_close(outputs["honest"], expected)
    torch.testing.assert_close(outputs["other"], expected_other)


def test_a_poisoned_copy_is_not_given_to_an_adapter_that_names_the_subspace(tmp_path):
    bases = subspace(0)
    bases.save_pretrained(tmp_path / "bases")
    expected = trained(bases, tmp_path / "honest")
    trained(subspace(50), tmp_path / "other", seed=2)
    edit(tmp_path / "other", subspace_sha256=bases.fingerprint)
    del bases
    model = load(tmp_path / "other")
    model.load_adapter(tmp_path / "honest", "honest")
    model.set_adapter("honest")
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("first", ["float32", "bfloat16"])
def test_an_adapter_saved_in_half_precision_changes_no_neighbor(tmp_path, first):
    bases = subspace(0)
    bases.save_pretrained(tmp_path / "bases")
    trained(bases, tmp_path / "float32")
    trained(bases, tmp_path / "bfloat16", seed=2, dtype=torch.bfloat16, save_subspace="embed")
    alone = {name: load(tmp_path / name)(X) for name in ("float32", "bfloat16")}
    second = "bfloat16" if first == "float32" else "float32"
    model = load(tmp_path / first)
    model.load_adapter(tmp_path / second, "second")
    assert torch.equal(model(X), alone[first])
    model.set_adapter("second")
    torch.testing.assert_close(model(X), alone[second])


def test_equal_embedded_components_are_one_copy(tmp_path, honest):
    folder, expected = honest
    shutil.copytree(folder, tmp_path / "copy")
    model = load(folder)
    model.load_adapter(tmp_path / "copy", "copy")
    layer = model.base_model.model[0]
    assert layer.lora_A["default"].frozen_bank is layer.lora_A["copy"].frozen_bank is layer.lora_B["copy"].frozen_bank
    assert len(layer.lora_bases) == 1
    model.set_adapter("copy")
    torch.testing.assert_close(model(X), expected)
    torch.testing.assert_close(copy.deepcopy(model)(X), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {k: v for k, v in tensors.items() if not k.endswith("components")}, "4 tensors .* missing"),
        (lambda tensors: {k: v for k, v in tensors.items() if "1.lora_B.components" not in k}, "1 tensors .* missing"),
        (
            lambda tensors: {k: v[:2] if k.endswith("components") else v for k, v in tensors.items()},
            r"of shape \(2, 20\)",
        ),
        (
            lambda tensors: {k: v[:, :3].clone() if k.endswith("components") else v for k, v in tensors.items()},
            "altered",
        ),
        (lambda tensors: {k: v.int() if k.endswith("components") else v for k, v in tensors.items()}, "torch.int32"),
        (
            lambda tensors: {k: v * float("nan") if k.endswith("components") else v for k, v in tensors.items()},
            "finite",
        ),
    ],
)
def test_embedded_components_that_are_missing_or_of_another_kind(honest, change, message):
    edit_tensors(honest[0], change)
    with pytest.raises(AdapterConfigError, match=message):
        load(honest[0])


# A count that is missing, and numbers of components of a subspace that is not to be found, have messages of their own.
_NAMED = {
    "embedded_n_components": r"embedded_n_components(\['[01]'\])?=|embeds no components for '0'",
    "subspace_sha256": r"subspace_sha256=.* must be 64 hexadecimal digits",
    "n_components": r"The subspace .* that the adapter refers to .* was not found",
    "subspace": r"subspace=.* must be a path, a Hub id or a PrincipalSubspace",
    "r": r"r=0 must be a whole number of at least 1",
}


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"embedded_n_components": dict.fromkeys(WIDTHS, count)}
            for count in (10**9, 10**400, 13, 0, -1, "4", 4.0, True)
        ),
        *({"embedded_n_components": counts} for counts in ([4, 4], "4", {"0": None})),
        *({"subspace_sha256": value} for value in ("x", "0" * 63, 5, ["0" * 64])),
        *({"subspace": value, "embedded_n_components": None} for value in (5, ["x"], {"a": 1})),
        {"n_components": 10**9, "embedded_n_components": None},
        {"r": 0},
    ],
    ids=str,
)
def test_configs_that_cannot_be_are_one_error_that_names_the_field(honest, change):
    with pytest.raises(EigenPeftError, match=_NAMED[next(iter(change))]):
        load(edit(honest[0], **change))


def test_a_start_in_a_file_is_not_opened(tmp_path, honest, monkeypatch, caplog):
    folder, expected = honest
    opened = []
    monkeypatch.setattr("eigenpeft.tuners.eigenlora.model.read_warm_start", lambda *a: opened.append(a))
    with caplog.at_level(logging.WARNING, logger="eigenpeft"):
        model = load(edit(folder, init_from=str(tmp_path / "secret")))
    assert opened == []
    assert "in an adapter's file is passed over" in caplog.text
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("place", ["x/..", "..", ".", "", "a" * 10_000, "a\0b", "no/such/place"])
def test_names_of_subspaces_are_no_way_out_of_the_search_folder(tmp_path, monkeypatch, place):
    bases = subspace(0)
    trained(bases, tmp_path / "adapter", save_subspace="reference")
    bases.save_pretrained(tmp_path / "library")
    (tmp_path / "library" / "search").mkdir()
    config = {"subspace": place, "subspace_sha256": bases.fingerprint, "embedded_n_components": None}
    edit(tmp_path / "adapter", save_subspace="reference", **config)
    del bases
    monkeypatch.setenv(shared_bases.SEARCH_PATH, str(tmp_path / "library" / "search"))
    monkeypatch.chdir("/")
    with pytest.raises(EigenPeftError, match="was not found|is not a subspace"):
        load(tmp_path / "adapter")


def test_a_missing_fingerprint_is_said(tmp_path):
    bases = subspace(0)
    bases.save_pretrained(tmp_path / "bases")
    expected = trained(bases, tmp_path / "adapter")
    del bases
    edit(tmp_path / "adapter", subspace_sha256=None)
    with pytest.warns(UserWarning, match=r"no fingerprint of its subspace \(subspace_sha256\)"):
        model = load(tmp_path / "adapter")
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), -1, "0", [0]])
def test_a_bound_that_no_build_writes_is_an_error(tmp_path, value):
    subspace(0).save_pretrained(tmp_path / "bases")
    path = tmp_path / "bases" / "subspace_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "missed_share_bound": value}))
    with pytest.raises(EigenPeftError, match="missed_share_bound=.*which no version of eigenpeft writes"):
        PrincipalSubspace.from_pretrained(tmp_path / "bases")
