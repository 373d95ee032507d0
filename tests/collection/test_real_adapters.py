"""Real GPT-2 adapters, three that ship and thirteen that may be at hand: read together, and what is odd is found."""

import pytest
import torch
from safetensors.torch import load_file

from eigenpeft.collection import AdapterCollection


def test_shipped_adapters(shipped_adapters_dir):
    collection = AdapterCollection.from_pretrained(shipped_adapters_dir)
    assert collection.names == ("legal", "medical", "sports")
    assert {adapter.license for adapter in collection.adapters} == {"mit"}
    assert collection.shapes == {
        "transformer.h.0.attn.c_attn": (2304, 768),
        "transformer.h.0.attn.c_proj": (768, 768),
        "transformer.h.0.mlp.c_proj": (768, 3072),
    }
    for module in collection.modules:
        for read in collection.factors(module):
            stored = load_file(shipped_adapters_dir / read.adapter / "adapter_model.safetensors")
            torch.testing.assert_close(read.lora_A, stored[f"base_model.model.{module}.lora_A.weight"])
            torch.testing.assert_close(read.lora_B, 16 / 8 * stored[f"base_model.model.{module}.lora_B.weight"])
    findings = collection.diagnose(progress=False)
    assert [(finding.kind, finding.adapters) for finding in findings] == [("same_start", ("medical", "sports"))]


@pytest.fixture(scope="module")
def collection(real_adapters_dir):
    return AdapterCollection.from_pretrained(real_adapters_dir)


def test_all_open_together(collection):
    assert len(collection) == 13
    assert len(collection.modules) == 36
    assert collection.base_model == "gpt2"
    assert collection.shapes["transformer.h.11.attn.c_attn"] == (2304, 768)
    assert len(collection.names_with("transformer.h.0.attn.c_attn")) == 13
    assert all(collection.fan_in_fan_out(module) for module in collection.modules)
    assert {adapter.rank for adapter in collection.adapters} == {1, 8, 16}


def test_what_is_odd_about_them(collection):
    findings = collection.diagnose(progress=False)
    found = {(finding.kind, finding.adapters) for finding in findings if finding.kind != "missing_modules"}
    assert found == {
        ("kept_aside", ("anirudh-ak", "b-ritter", "goutham", "hitoshi", "stathopoan", "thesotti")),
        ("untrained", ("bhavesh",)),
        ("outlier_norm", ("anirudh-ak",)),
        ("outlier_norm", ("fegbewunmi",)),
        ("same_start", ("parikshit_medical", "parikshit_sports")),
    }
    assert sum(finding.kind == "missing_modules" for finding in findings) == 2
