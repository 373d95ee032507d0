"""Adapters that were trained before their subspace grew: found at its place, the same logits to the last bit."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file

from eigenpeft import AdapterBank, AdapterStore, EigenLoraConfig
from eigenpeft.subspace import PrincipalSubspace
from tests.tuners.conftest import random_subspace, tiny_bert


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 13).reshape(2, 6)).logits


def write_lora(folder, subspace, *, rank):
    """A LoRA adapter with directions that the subspace lacks."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, bank in subspace.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, bank.in_features, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(bank.out_features, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("core", ["low_rank", "full", "diagonal"])
def test_an_adapter_from_before_keeps_its_logits(core, tmp_path, monkeypatch):
    subspace = random_subspace(tiny_bert(), ("query",), n_components=6)
    AdapterStore(subspace).save_pretrained(tmp_path / "store")
    config = EigenLoraConfig(
        subspace=str(tmp_path / "store"),
        core=core,
        r=2,
        init_lora_weights=False,
        task_type="SEQ_CLS",
        save_subspace="reference",
    )
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), config)
    before = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    store = AdapterStore.from_pretrained(tmp_path / "store")
    store.add(tmp_path / "adapter", name="early")
    write_lora(tmp_path / "later", subspace, rank=3)
    store.absorb(tmp_path / "later", held_share=1.0)
    del model, config, subspace  # so that nothing in memory is found instead
    monkeypatch.setattr("eigenpeft.tuners.layers.shared_bases._live", {})
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), before)
    wide = PrincipalSubspace.from_pretrained(tmp_path / "store")
    assert {bank.n_components for bank in wide.values()} == {9}
    # The member that was added before, one that is added only now, and one that trains in the grown bases, side by side.
    opened = AdapterStore.from_pretrained(tmp_path / "store")
    opened.add(tmp_path / "adapter", name="added-after")
    base = tiny_bert().eval()
    bank = AdapterBank.from_store(opened)
    with bank.attached(base), torch.no_grad():
        for name in ("early", "added-after"):
            with bank.use([name, name]):
                torch.testing.assert_close(logits(base), before, rtol=0, atol=1e-6)
    later = get_peft_model(
        tiny_bert(), EigenLoraConfig(subspace=str(tmp_path / "store"), core=core, r=2, task_type="SEQ_CLS")
    )
    opened.add(later, name="later-training")
    assert {core.n_components_in for core in opened["later-training"].values()} == {9}
    assert {core.n_components_in for core in opened["early"].values()} == {6}
