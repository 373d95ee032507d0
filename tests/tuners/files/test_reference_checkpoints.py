"""Checkpoints in the papers' own formats give, as plain LoRA, the update that their forward pass computes."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from eigenpeft import AdapterCollection
from eigenpeft.cli import load
from eigenpeft.errors import CollectionError
from eigenpeft.tuners import convert_reference_checkpoint
from tests.factories import tiny_llama

MODULES = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.1.self_attn.v_proj": (8, 16)}
HEAD = {"base_model.model.score.weight": torch.ones(2, 16)}


def eigenlora(folder, *, loadings=True, r=3, k=5, seed=0):
    """What EigenLoRAx's fork of PEFT writes; returns ΔW by module, as its forward has it: x ↦ (x C_A L_A)(C_B L_B)ᵀ."""
    generator = torch.Generator().manual_seed(seed)
    tensors, updates = {}, {}
    for module, (m, n) in MODULES.items():
        parts = {
            "A.components": torch.randn(n, k, generator=generator),
            "A.loadings": torch.randn(k, r, generator=generator),
            "B.components": torch.randn(m, k, generator=generator),
            "B.loadings": torch.randn(k, r, generator=generator),
        }
        updates[module] = torch.stack(
            [
                (x @ parts["A.components"] @ parts["A.loadings"]) @ (parts["B.components"] @ parts["B.loadings"]).T
                for x in torch.eye(n)
            ],
            dim=1,
        )
        for name, tensor in parts.items():
            if loadings or "components" in name:
                tensors[f"base_model.model.{module}.eigenlora_{name}"] = tensor
    return written(folder, tensors, {"peft_type": "EIGENLORA", "r": r, "num_components": k}), updates


def moslora(folder, *, r=4, alpha=8, as_bin=True, seed=0):
    """What MoSLoRA's fork of PEFT writes; returns ΔW by module, as its forward has it: x ↦ α/r · lora_B(lora_AB(lora_A(x)))."""
    generator = torch.Generator().manual_seed(seed)
    tensors, updates = {}, {}
    for module, (m, n) in MODULES.items():
        shapes = {"A": (r, n), "AB": (r, r), "B": (m, r)}
        parts = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
        linear = torch.nn.functional.linear
        updates[module] = alpha / r * linear(linear(linear(torch.eye(n), parts["A"]), parts["AB"]), parts["B"]).T
        tensors |= {f"base_model.model.{module}.lora_{name}.weight": tensor for name, tensor in parts.items()}
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "lora_use_mixer": True, "enable_lora": None}
    return written(folder, tensors, {**config, "merge_weights": False}, as_bin=as_bin), updates


def written(folder, tensors, config, *, as_bin=False):
    folder.mkdir()
    config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if as_bin:
        torch.save(tensors | HEAD, folder / "adapter_model.bin")
    else:
        save_file(tensors | HEAD, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("make", [eigenlora, moslora])
def test_the_update_is_the_reference_s(tmp_path, make):
    folder, updates = make(tmp_path / "theirs")
    convert_reference_checkpoint(folder, tmp_path / "lora")
    collection = AdapterCollection.from_pretrained(tmp_path / "lora")
    assert set(collection.modules) == set(MODULES)
    for module, expected in updates.items():
        (found,) = collection.factors(module)
        torch.testing.assert_close(found.lora_B @ found.lora_A, expected, atol=1e-4, rtol=1e-4)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").merge_and_unload()
    base = tiny_llama()
    for module, expected in updates.items():
        delta = model.get_submodule(module).weight - base.get_submodule(module).weight
        torch.testing.assert_close(delta, expected, atol=1e-4, rtol=1e-4)


def test_patterns_and_rslora_are_counted(tmp_path):
    folder, updates = moslora(tmp_path / "theirs", as_bin=False)
    config = json.loads((folder / "adapter_config.json").read_text())
    pattern = {"q_proj": 32}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True, "alpha_pattern": pattern}))
    convert_reference_checkpoint(folder, tmp_path / "lora")
    collection = AdapterCollection.from_pretrained(tmp_path / "lora")
    for (module, expected), scaling in zip(updates.items(), (32 / 2, 8 / 2), strict=True):
        (found,) = collection.factors(module)
        torch.testing.assert_close(found.lora_B @ found.lora_A, expected * scaling / 2, atol=1e-3, rtol=1e-4)


def spoilt(folder, change):
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.ones(4, n) for name, (_, n) in MODULES.items()}
    tensors |= {f"base_model.model.{name}.lora_B.weight": torch.ones(m, 4) for name, (m, _) in MODULES.items()}
    tensors |= {f"base_model.model.{name}.lora_AB.weight": torch.ones(4, 4) for name in MODULES}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_use_mixer": True}
    change(tensors, config)
    return written(folder, tensors, config)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, config: config.pop("lora_use_mixer"), "A plain LoRA needs no conversion"),
        (lambda tensors, config: tensors.pop(KEY.format("AB")), "lacks 'AB'"),
        (lambda tensors, config: config.pop("lora_alpha"), "has lora_alpha=None in its config"),
        (lambda tensors, config: config.update(lora_alpha=float("nan")), "has lora_alpha=nan in its config"),
        (lambda tensors, config: config.update(lora_alpha=1e400), "has lora_alpha=inf in its config"),
        (lambda tensors, config: config.update(r=0), "has r=0 in its config"),
        (lambda tensors, config: config.update(r="4"), "has r='4' in its config"),
        (lambda tensors, config: config.update(r=2), "rank 4 for .* and rank 2 in its config"),
        (lambda tensors, config: config.update(alpha_pattern=[1]), r"has alpha_pattern=\[1\] in its config"),
        (lambda tensors, config: config.update(alpha_pattern={"(": 1}), "has alpha_pattern with"),
        (lambda tensors, config: config.update(task_type="NOPE"), "has task_type 'NOPE'; PEFT knows SEQ_CLS"),
        (
            lambda tensors, config: tensors.update(
                {KEY.format("A").replace(".weight", ".b.weight"): torch.ones(4, 16)}
            ),
            "holds several adapters, None, b",
        ),
        (lambda tensors, config: tensors[KEY.format("A")].fill_(float("nan")), "NaN or Inf"),
        (lambda tensors, config: tensors.update({KEY.format("B"): torch.ones(16, 5)}), "do not fit"),
        (lambda tensors, config: tensors.clear(), "none of the tensors of its kind"),
    ],
)
def test_what_cannot_be_converted_is_one_message(tmp_path, change, message):
    folder = spoilt(tmp_path / "theirs", change)
    with pytest.raises(CollectionError, match=message):
        convert_reference_checkpoint(folder, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_components_alone_are_no_adapter(tmp_path):
    folder, _ = eigenlora(tmp_path / "theirs", loadings=False)
    with pytest.raises(CollectionError, match="components but no loadings"):
        convert_reference_checkpoint(folder, tmp_path / "lora")
    with pytest.raises(CollectionError, match="not an adapter folder"):
        convert_reference_checkpoint(tmp_path / "absent", tmp_path / "lora")


def test_the_command_converts(tmp_path):
    folder, _ = moslora(tmp_path / "theirs")
    ran = CliRunner().invoke(load("convert"), ["convert", str(folder), "--out", str(tmp_path / "lora"), "--json"])
    assert ran.exit_code == 0
    assert json.loads(ran.stdout)["path"] == str(tmp_path / "lora")
    assert AdapterCollection.from_pretrained(tmp_path / "lora").names == ("lora",)


def test_tensors_of_whole_numbers_are_kept(tmp_path):
    folder = spoilt(tmp_path / "theirs", lambda tensors, config: tensors.update(position_ids=torch.arange(3)))
    convert_reference_checkpoint(folder, tmp_path / "lora")
    assert load_file(tmp_path / "lora" / "adapter_model.safetensors")["position_ids"].tolist() == [0, 1, 2]


def test_a_folder_without_a_readable_config_is_refused(tmp_path):
    moslora(tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text("[]")
    with pytest.raises(CollectionError, match="adapter_config.json that is not a JSON object; get a fresh copy"):
        convert_reference_checkpoint(tmp_path / "m", tmp_path / "plain")
    with pytest.raises(
        CollectionError, match="is not an adapter folder: .* Pass the folder that has adapter_config.json"
    ):
        convert_reference_checkpoint(tmp_path / "nowhere", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
