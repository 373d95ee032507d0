"""Patterns in an adapter's file: what they mean in the model takes their place, and none hangs."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from eigenpeft import EigenLoraConfig, MosLoraConfig
from eigenpeft.collection.formats import patterns
from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.host.file_patterns import settle_patterns
from tests.tuners.conftest import logits, random_subspace, tiny_llama, train

ENDLESS = r"(?:[\w.]|[\w.][\w.])*(?<![\w.])"  # fits no name, and takes 1.6^n steps to find out


def base():
    return tiny_llama(num_hidden_layers=2)


def saved(folder, tokens, **options):
    model = get_peft_model(base(), MosLoraConfig(r=4, task_type="CAUSAL_LM", **options))
    expected = train(model, tokens)
    model.save_pretrained(folder)
    return expected, ranks(model)


def ranks(model):
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    return {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers}


def edit(folder, **change):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_only_what_has_to_be_said_otherwise_is_returned():
    said = {"target_modules": ["q_proj"], "exclude_modules": None, "rank_pattern": {"q_proj": 2}}
    assert settle_patterns(said, base()) == {}
    q0, q1 = (f"model.layers.{number}.self_attn.q_proj" for number in range(2))
    found = settle_patterns({"target_modules": r".*\.q_proj", "alpha_pattern": {r".*1.*q_proj": 3}}, base())
    assert found == {
        "target_modules": {q0, q1},
        "exclude_modules": None,
        "alpha_pattern": {f"^{re.escape(q1)}": 3},
    }
    assert settle_patterns({"target_modules": ["q_proj"], "exclude_modules": r".*0.*"}, base())["target_modules"] == {
        q1
    }
    every = settle_patterns({"target_modules": "all-linear", "exclude_modules": r".*q_proj"}, base())
    assert every == {"exclude_modules": [q0, q1]}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r".*layers\.1.*proj", "exclude_modules": r".*\.mlp\..*"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": r".*_proj", "exclude_modules": ["gate_proj", "model.layers.0.mlp.up_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {r".*0\.\w+\.(q|k)_proj": 2, "k_proj": 3}},
        {"target_modules": ["q_proj"], "alpha_pattern": {r".*1.*q_proj": 40}, "rank_pattern": {"q_proj": 3}},
    ],
)
def test_a_file_means_what_peft_reads_in_it(tmp_path, tokens, options):
    expected, made = saved(tmp_path, tokens, **options)
    back = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert ranks(back) == made
    torch.testing.assert_close(logits(back, tokens), expected)
    mixed = get_peft_model(base(), LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM"), mixed=True)
    mixed.load_adapter(str(tmp_path), "ours")
    mixed.set_adapter("ours")
    torch.testing.assert_close(logits(mixed.eval(), tokens), expected)
    back.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(base(), tmp_path / "again").eval()
    assert ranks(again) == made
    torch.testing.assert_close(logits(again, tokens), expected)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_an_expression_without_end_stops_at_the_time_limit(tmp_path, tokens, monkeypatch, field):
    monkeypatch.setattr(patterns, "TIME_LIMIT", 0.2)
    saved(tmp_path, tokens, target_modules=["q_proj"])
    edit(tmp_path, **{field: {ENDLESS: 2} if field.endswith("pattern") else ENDLESS})
    with pytest.raises(AdapterConfigError, match="which takes more than 0 seconds to be matched against module names"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_what_is_quick_for_one_library_is_not_given_to_the_other(tmp_path, tokens):
    """The one that stops knows at once that no name has a "!" in it, and the standard one would take 2^n steps to find out."""
    saved(tmp_path, tokens, target_modules=["q_proj"])
    edit(tmp_path, rank_pattern={r"(([a-z]|[a-z_.]|[0-9])+)+!": 2})
    back = PeftModel.from_pretrained(base(), tmp_path)
    assert back.peft_config["default"].rank_pattern == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_save": [ENDLESS]}, "modules_to_save in the adapter's file has .* must be a plain name"),
        ({"layers_pattern": ENDLESS, "layers_to_transform": [0]}, "layers_pattern in the adapter's file has"),
        ({"target_modules": "(q_proj"}, "file has '.q_proj', which is not a regular expression"),
        ({"target_modules": "a{9999}{9999}"}, "whose counted repetitions make more than"),
        ({"target_modules": r".*\.nothing"}, "means no module of the model"),
        ({"r": 10**9}, r"file has the rank 1000000000 \('r'\), which must be a whole number from 1 to 2\d\d,"),
        ({"rank_pattern": {"q_proj": 10**9}}, r"file has the rank 1000000000 \('q_proj'\)"),
        ({"rank_pattern": {"q_proj": "4"}}, r"file has the rank 4 \('q_proj'\)"),
        ({"alpha_pattern": {"q_proj": None}}, r"file has the alpha None \('q_proj'\)"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a finite number"),
        ({"lora_alpha": None}, "lora_alpha=None must be a finite number"),
    ],
)
@pytest.mark.parametrize("method", [MosLoraConfig, EigenLoraConfig])
def test_what_cannot_be_meant_is_one_error(tmp_path, tokens, method, change, message):
    if method is MosLoraConfig:
        saved(tmp_path, tokens, target_modules=["q_proj"])
    else:
        subspace = random_subspace(base(), ["q_proj"])
        get_peft_model(base(), EigenLoraConfig(subspace=subspace, r=2)).save_pretrained(tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(AdapterConfigError, match=message):
        PeftModel.from_pretrained(base(), tmp_path)
