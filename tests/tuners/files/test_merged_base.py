"""merge_into_base: the merged model has the adapter's outputs, tied embeddings included, or one message says why not."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from eigenpeft import EigenLoraConfig, MosLoraConfig
from eigenpeft.collection.formats import patterns
from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.files.merged_base import merge_into_base
from tests.tuners.conftest import logits, random_subspace, tiny_bert, tiny_llama, train

# PEFT's own, about tied and resized embeddings, which these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TIED = {"tie_word_embeddings": True, "num_hidden_layers": 1}


def saved_base(folder, model):
    model.save_pretrained(folder)
    model.name_or_path = model.config._name_or_path = str(folder)
    return model


OPTIONS = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tied factors": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "output layer": {"target_modules": ["q_proj", "lm_head"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "neither": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("part", OPTIONS)
def test_tied_embeddings_merge_to_the_adapters_logits(tmp_path, tokens, part):
    base = saved_base(tmp_path / "base", tiny_llama(**TIED))
    model = get_peft_model(base, MosLoraConfig(r=4, task_type="CAUSAL_LM", **OPTIONS[part]))
    expected = train(model, tokens, steps=2, lr=0.05)
    model.save_pretrained(tmp_path / "adapter")
    merged, named = merge_into_base(str(tmp_path / "adapter"))
    assert named == str(tmp_path / "base")
    torch.testing.assert_close(logits(merged, tokens), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(back, tokens), expected, atol=1e-4, rtol=1e-4)
    if part != "tied factors":  # whose two products may round differently
        assert back.config.tie_word_embeddings == (part in ("tokens", "neither"))


def test_a_classifier_with_other_labels_merges_with_its_head(tmp_path, tokens):
    saved_base(tmp_path / "base", tiny_bert(num_labels=2))
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    subspace = random_subspace(base, ["query"])
    model = get_peft_model(base, EigenLoraConfig(subspace=subspace, r=2, task_type="SEQ_CLS")).eval()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterConfigError, match="does not fit the base model .* pass --num-labels"):
        merge_into_base(str(tmp_path / "adapter"))
    merged, _ = merge_into_base(str(tmp_path / "adapter"), num_labels=5)
    torch.testing.assert_close(logits(merged, tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)


def adapter_of(tmp_path, **options):
    base = saved_base(tmp_path / "base", tiny_llama(num_hidden_layers=1))
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False, **options)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_cannot_be_merged_is_one_message(tmp_path, monkeypatch):
    folder = adapter_of(tmp_path)
    with pytest.raises(AdapterConfigError, match="base' is not an adapter that PEFT can read"):
        merge_into_base(str(tmp_path / "base"))
    edit(folder, base_model_name_or_path=None)
    with pytest.raises(AdapterConfigError, match="names the base model None and the task type 'CAUSAL_LM'"):
        merge_into_base(str(folder))
    with pytest.raises(AdapterConfigError, match="The base model 'nowhere' cannot be loaded"):
        merge_into_base(str(folder), base="nowhere")
    edit(folder, target_modules=["q_proj", "v_proj"])
    with pytest.raises(AdapterConfigError, match="does not fit the base model .*missing adapter keys"):
        merge_into_base(str(folder), base=str(tmp_path / "base"))
    edit(folder, target_modules=["q_proj"], alpha_pattern={r"(?:[\w.]|[\w.][\w.])*(?<![\w.])": 2})
    monkeypatch.setattr(patterns, "TIME_LIMIT", 0.1)
    with pytest.raises(AdapterConfigError, match="takes more than 0 seconds to be matched against module names"):
        merge_into_base(str(folder), base=str(tmp_path / "base"))
    edit(folder, peft_type="NOPE")
    with pytest.raises(AdapterConfigError, match="is not an adapter that PEFT can read"):
        merge_into_base(str(folder))


def test_a_resized_vocabulary_says_what_to_pass(tmp_path):
    base = saved_base(tmp_path / "base", tiny_llama(num_hidden_layers=1))
    base.resize_token_embeddings(60, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterConfigError, match="resized vocabulary .* save the base model with those sizes"):
        merge_into_base(str(tmp_path / "adapter"))


def test_activated_lora_is_refused(tmp_path):
    folder = adapter_of(tmp_path, alora_invocation_tokens=[1, 2])
    with pytest.raises(AdapterConfigError, match="cannot be merged"):
        merge_into_base(str(folder))
