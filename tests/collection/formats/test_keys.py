"""Keys: what PEFT, old PEFT and hand-made checkpoints write, and the pattern rule beside PEFT's own."""

import pytest
from peft.utils.other import get_pattern_key

from eigenpeft.collection.formats.keys import natural_order, parse_key
from eigenpeft.collection.formats.patterns import PatternTable


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize(
    ("prefix", "inner"),
    [
        ("base_model.model.", ""),
        ("base_model.model.", ".default"),
        ("", ""),
        ("", ".my_adapter"),
        ("module.base_model.model.", ""),
        ("_orig_mod.base_model.model.", ""),
        ("base_model.model._orig_mod.", ""),
        ("base_model.model._fsdp_wrapped_module.", ".default"),
    ],
)
def test_module_and_factor_in_every_spelling(prefix, inner, factor):
    parsed = parse_key(f"{prefix}model.layers.0.self_attn.q_proj.lora_{factor}{inner}.weight")
    assert (parsed.kind, parsed.module, parsed.factor) == ("factor", "model.layers.0.self_attn.q_proj", factor)
    assert parsed.adapter == (inner.removeprefix(".") or None)


def test_only_pefts_prefix_is_stripped():
    assert parse_key("base_model.model.model.layers.0.q.lora_A.weight").module == "model.layers.0.q"
    assert parse_key("module.q.lora_A.weight").module == "module.q"
    assert parse_key("base_model.model.attn.base_layer.out_proj.lora_A.weight").module == "attn.base_layer.out_proj"


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.score.weight",
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.q.base_layer.weight",
        "base_model.model.q.lora_B.bias",
        "base_model.model.q.lora_B.default.bias",
        "base_model.model.q.bias",
        "base_model.model.wte.lora_embedding_A",
        "base_model.model.wte.lora_embedding_B.default",
        "base_model.model.wte.token_adapter.trainable_tokens_delta",
        "base_model.model.q.lora_velora_embed.default",
    ],
)
def test_what_is_no_update_is_kept_aside(key):
    assert parse_key(key).kind == "aside"


@pytest.mark.parametrize("ending", ["", ".default"])
def test_embedding_factors_are_read_when_asked_for(ending):
    parsed = parse_key(f"base_model.model.wte.lora_embedding_A{ending}", embeddings=True)
    assert (parsed.kind, parsed.module, parsed.factor) == ("factor", "wte", "A")


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.q.lora_magnitude_vector",
        "base_model.model.q.lora_magnitude_vector.default.weight",
        "base_model.model.q.lora_diag.default",
        "base_model.model.q.lora_E",
        "base_model.model.q.lora_monteclora_sampler.default.std",
        "base_model.model.q.lora_A",  # loralib's own spelling, whose scaling is elsewhere
    ],
)
def test_tensors_of_other_methods_are_foreign(key):
    assert parse_key(key).kind == "foreign"


def test_natural_order():
    names = ["h.10.attn", "h.2.attn", "h.2.mlp", "a", "h.attn"]
    assert sorted(names, key=natural_order) == ["a", "h.2.attn", "h.2.mlp", "h.10.attn", "h.attn"]


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"q_proj": 2},
        {"^model.layers.0.q_proj": 2, "q_proj": 4},
        {"q_proj": 4, "^model.layers.0.q_proj": 2},
        {r"layers\.[01]\.q_proj": 2},
        {"layers.1.q_proj": 2, "proj": 8},
        {"_proj": 8},
        {"model.layers.0.q_proj": 3},
        {".*": 5, "q_proj": 4},
        {"q_proj|v_proj": 6},
    ],
)
@pytest.mark.parametrize(
    "module", ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.10.v_proj", "q_proj"]
)
def test_patterns_fit_as_in_peft(patterns, module):
    assert PatternTable(patterns).value(module, default=7) == patterns.get(get_pattern_key(patterns.keys(), module), 7)
