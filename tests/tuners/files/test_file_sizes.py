"""How small an adapter's file is: 2 K numbers where LoRA keeps n + m, by the weights that are adapted."""

import pytest
from peft import LoraConfig, get_peft_model

from eigenpeft import EigenLoraConfig
from tests.factories import tiny_bert
from tests.tuners.conftest import random_subspace

# all-MiniLM-L6-v2's shapes; what the weights are changes no size.
MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}


def saved_bytes(config, folder):
    get_peft_model(tiny_bert(**MINILM), config).save_pretrained(folder)
    return (folder / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("targets", "smaller"),
    [
        (r".*\.(query|value)", 10),  # (384 + 384) / 2 K = 12 before any header
        (r".*encoder\..*(query|key|value|dense)", 15),  # 18 on average
        (r".*layer\.\d+\.(intermediate|output)\.dense", 26),  # (384 + 1536) / 2 K = 30
    ],
    ids=["query and value", "all linear layers", "feed-forward"],
)
def test_coefficients_against_lora_of_equal_rank(tmp_path, targets, smaller):
    subspace = random_subspace(tiny_bert(**MINILM), (".query", ".key", ".value", ".dense"), n_components=32)
    subspace.save_pretrained(tmp_path / "subspace")
    coefficients = saved_bytes(
        EigenLoraConfig(subspace=subspace, r=8, target_modules=targets), tmp_path / "coefficients"
    )
    lora = saved_bytes(LoraConfig(r=8, target_modules=targets), tmp_path / "lora")
    assert lora >= smaller * coefficients
