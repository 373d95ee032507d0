"""export_lora: plain LoRA folders, exact, loaded where eigenpeft is never imported."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from eigenpeft import EigenLoraConfig, MosLoraConfig, export_lora
from eigenpeft.errors import AdapterConfigError, ArtifactError
from tests.tuners.conftest import logits, random_subspace, tiny_bert, tiny_llama, train

PLAIN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
assert not any(name.startswith("eigenpeft") for name in sys.modules)
tokens, expected = torch.load(sys.argv[3], weights_only=True)
with torch.no_grad():
    assert (model(input_ids=tokens).logits - expected).abs().max() < 1e-4
"""


def trained(tokens, config):
    model = get_peft_model(tiny_llama(), config)
    return model, train(model, tokens)


def configs():
    subspace = random_subspace(tiny_llama(), ["q_proj", "v_proj"])
    common = {"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM"}
    return {
        "low_rank": EigenLoraConfig(subspace=subspace, **common),
        "mixer": EigenLoraConfig(subspace=subspace, core="mixer", **common),
        "diagonal": EigenLoraConfig(subspace=subspace, core="diagonal", use_rslora=True, **common),
        "patterns": EigenLoraConfig(
            subspace=subspace, rank_pattern={"0.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3}, **common
        ),
        "moslora": MosLoraConfig(target_modules=["q_proj", "v_proj"], **common),
    }


@pytest.mark.parametrize("kind", ["low_rank", "mixer", "diagonal", "patterns", "moslora"])
def test_export_is_a_plain_lora_with_the_same_logits(tmp_path, tokens, kind):
    model, expected = trained(tokens, configs()[kind])
    export_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not {"subspace", "core", "init_mixer", "requires_package"} & set(config)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-5, rtol=1e-5)


def test_export_loads_where_eigenpeft_is_never_imported(tmp_path, tokens):
    model, expected = trained(tokens, configs()["low_rank"])
    tiny_llama().save_pretrained(tmp_path / "base")
    export_lora(model, tmp_path / "lora")
    torch.save((tokens, expected), tmp_path / "expected.pt")
    subprocess.run(
        [sys.executable, "-c", PLAIN, tmp_path / "base", tmp_path / "lora", tmp_path / "expected.pt"],
        check=True,
        timeout=120,
    )


def test_smaller_rank_is_the_best_approximation(tmp_path, tokens):
    model, _ = trained(tokens, configs()["mixer"])
    export_lora(model, tmp_path / "lora", rank=3)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    ours, theirs = (
        {name: module for name, module in each.named_modules() if hasattr(module, "lora_A")} for each in (model, plain)
    )
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        update = layer.get_delta_weight("default").detach().double()
        values = torch.linalg.svdvals(update)
        error = torch.linalg.norm(theirs[name].get_delta_weight("default").detach().double() - update)
        torch.testing.assert_close(error, values[3:].square().sum().sqrt(), atol=1e-6, rtol=1e-4)


def test_heads_and_biases_travel(tmp_path, tokens):
    model = get_peft_model(
        tiny_bert(),
        EigenLoraConfig(subspace=random_subspace(tiny_bert(), ["query"]), r=4, task_type="SEQ_CLS", bias="lora_only"),
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=tokens, labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    expected = logits(model.eval(), tokens)
    export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_bert(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-5, rtol=1e-5)


def test_exports_any_lora_again(tmp_path, tokens):
    model, expected = trained(tokens, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-6, rtol=1e-6)


def test_refusals_leave_nothing(tmp_path, tokens):
    model, _ = trained(tokens, configs()["low_rank"])
    with pytest.raises(AdapterConfigError, match="adapter_name='other' is not in the model; it has 'default'"):
        export_lora(model, tmp_path / "lora", adapter_name="other")
    with pytest.raises(AdapterConfigError, match="rank=0 must be None or a whole number"):
        export_lora(model, tmp_path / "lora", rank=0)
    assert not (tmp_path / "lora").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(ArtifactError, match="is not empty and holds no adapter"):
        export_lora(model, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
