"""Both methods on a quantised base that runs on a CPU, whichever of bitsandbytes and torchao is installed."""

import importlib.util

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from eigenpeft import EigenLoraConfig, MosLoraConfig
from tests.tuners.conftest import logits, random_subspace, tiny_llama, train

TARGETS = ["q_proj", "v_proj", "down_proj"]


def settings(kind):
    if kind == "torchao int8":
        quantization = pytest.importorskip("torchao.quantization")
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "bitsandbytes 8 bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


KINDS = [
    pytest.param(
        kind, marks=pytest.mark.skipif(not importlib.util.find_spec(kind.split()[0]), reason=f"needs {kind.split()[0]}")
    )
    for kind in ("bitsandbytes 4 bit", "bitsandbytes 8 bit", "torchao int8")
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["moslora", "low_rank", "full", "diagonal"])
@pytest.mark.filterwarnings("ignore")  # the quantisers' own
def test_trains_saves_and_loads(kind, method, tmp_path, tokens):
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")

    def base():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=settings(kind), device_map="cpu", dtype=torch.float32
        )

    model = base()
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert type(weight) is not torch.nn.Parameter  # it is quantised indeed
    common = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": TARGETS}
    if method == "moslora":
        config = MosLoraConfig(**common)
    else:
        subspace = random_subspace(tiny_llama(hidden_size=64, intermediate_size=64), TARGETS)
        config = EigenLoraConfig(subspace=subspace, core=method, **common)
    start = logits(model.eval(), tokens)
    model = get_peft_model(model, config)
    torch.testing.assert_close(logits(model.eval(), tokens), start, atol=1e-5, rtol=1e-5)
    expected = train(model, tokens)
    assert (expected - start).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, tokens), expected, atol=1e-5, rtol=1e-5)
