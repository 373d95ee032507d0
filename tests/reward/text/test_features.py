"""Features: what the head reads, whatever the batch; cached in parts that an interrupted run leaves behind."""

import copy
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModel, BertModel, PreTrainedTokenizerFast

from eigenpeft.errors import RewardModelError
from eigenpeft.reward import LoReFitter
from eigenpeft.reward.text.backbone import reference_head, score_head
from eigenpeft.reward.text.features import embed_preferences, embed_texts
from eigenpeft.reward.text.rewards import classify
from tests.reward.conftest import tiny_bert, tiny_llama

TEXTS = ["a joke about cats", "the joke is not funny", "please help", "no"]


def test_the_head_on_the_features_gives_the_logits(backbone, tokenizer):
    features = embed_texts(backbone, tokenizer, TEXTS, batch_size=2)
    logits = classify(backbone, tokenizer, TEXTS, batch_size=4)
    bias = score_head(backbone)[1].bias
    expected = logits[:, 0] - (0 if bias is None else bias.item())
    torch.testing.assert_close(features @ reference_head(backbone), expected, atol=1e-5, rtol=1e-4)
    assert embed_texts(backbone, tokenizer, []).shape == (0, 16)


def test_an_encoder_without_a_head_is_averaged(backbone, tokenizer):
    encoder = AutoModel.from_config(backbone.config).eval()
    features = embed_texts(encoder, tokenizer, TEXTS, batch_size=3)
    one = encoder(**tokenizer(TEXTS[1], return_tensors="pt")).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(features[1:2], one.detach(), atol=1e-5, rtol=1e-4)


@pytest.fixture
def preferences():
    return Dataset.from_list(
        [
            {"prompt": "a joke ", "chosen": "about cats", "rejected": f"about {word}", "user_id": i % 3}
            for i, word in enumerate(["dogs", "no", "help", "me", "the", "yes", "please"])
        ]
    )


def test_comparisons_are_cached_in_parts(backbone, tokenizer, preferences, tmp_path, monkeypatch):
    options = {"cache_dir": tmp_path / "features", "part_size": 3}
    found = embed_preferences(preferences, model=backbone, processing_class=tokenizer, **options)
    assert found["rejected"][:].shape == (7, 16)
    assert found["user_id"][:3].tolist() == ["0", "1", "2"]
    direct = embed_texts(backbone, tokenizer, ["a joke about " + "help"])
    torch.testing.assert_close(torch.from_numpy(found["rejected"][2:3]), direct, atol=1e-5, rtol=1e-4)
    fitted = LoReFitter(n_basis=1, strength=1.0).fit(
        found["chosen"], found["rejected"], user_ids=found["user_id"][:].tolist()
    )
    assert fitted.model_.n_features == 16

    # Interrupted after the first part: what is there is not made again.
    calls = []
    real = embed_texts
    monkeypatch.setattr(
        "eigenpeft.reward.text.features.embed_texts", lambda *a, **k: calls.append(len(a[2])) or real(*a, **k)
    )
    parts = sorted((tmp_path / "features").glob("part-*"), key=lambda part: part.stat().st_mtime_ns)
    for part in parts[1:]:
        shutil.rmtree(part)
    again = embed_preferences(preferences, model=backbone, processing_class=tokenizer, **options)
    assert calls == [4, 1]  # "a joke about cats" once, although it stands in every row
    for side in ("chosen", "rejected"):
        torch.testing.assert_close(
            torch.from_numpy(again[side][:]), torch.from_numpy(found[side][:]), atol=1e-5, rtol=1e-4
        )
    embed_preferences(preferences, model=backbone, processing_class=tokenizer, **options)
    assert calls == [4, 1]


def test_rows_added_at_the_end_cost_only_themselves(backbone, tokenizer, preferences, tmp_path, monkeypatch):
    options = {"cache_dir": tmp_path, "part_size": 2}
    embed_preferences(preferences.select(range(4)), model=backbone, processing_class=tokenizer, **options)
    calls = []
    real = embed_texts
    monkeypatch.setattr(
        "eigenpeft.reward.text.features.embed_texts", lambda *a, **k: calls.append(len(a[2])) or real(*a, **k)
    )
    with torch.no_grad():
        score_head(backbone)[1].weight.add_(1)  # the head does not count: features are what it is given
    found = embed_preferences(preferences, model=backbone, processing_class=tokenizer, **options)
    assert calls == [3, 1]
    direct = real(backbone, tokenizer, ["a joke about please"])
    torch.testing.assert_close(torch.from_numpy(found["rejected"][6:7]), direct, atol=1e-5, rtol=1e-4)


def test_a_trained_head_is_used_and_left_as_it_was(tokenizer):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    model.base_model.model.score.modules_to_save["default"].weight.data.normal_()
    trained = model.base_model.model.score.modules_to_save["default"].weight.detach().clone()
    keys = list(model.state_dict())
    features = embed_texts(model, tokenizer, ["a joke about cats", "no"])
    torch.testing.assert_close(reference_head(model), trained[0])
    rewards = classify(model, tokenizer, ["a joke about cats", "no"], batch_size=2)
    torch.testing.assert_close(features @ trained.mT, rewards, atol=1e-5, rtol=1e-4)
    assert list(model.state_dict()) == keys
    with model.disable_adapter():
        assert not torch.equal(reference_head(model), trained[0])


def test_a_head_that_lora_adapts_counts_with_its_update():
    model = get_peft_model(tiny_llama(), LoraConfig(r=1, target_modules=["score"], init_lora_weights=False))
    base = model.base_model.model.score.base_layer.weight.detach()
    update = model.base_model.model.score.get_delta_weight("default").detach()
    torch.testing.assert_close(reference_head(model), (base + update)[0])


def test_dropout_is_off_and_the_mode_comes_back(tokenizer):
    encoder = BertModel(tiny_bert().config).train()
    texts = ["a joke about cats", "no"]
    assert torch.equal(embed_texts(encoder, tokenizer, texts), embed_texts(encoder, tokenizer, texts))
    assert encoder.training


def test_two_padding_tokens_are_refused(tokenizer):
    model = tiny_llama()
    model.config.pad_token_id = 2
    with pytest.raises(RewardModelError, match=r"pads with '<pad>' \(number 0\), the model's config names number 2"):
        embed_texts(model, tokenizer, ["a joke", "about cats and dogs"])


def test_a_cache_of_something_else_is_refused(backbone, tokenizer, preferences, tmp_path):
    embed_preferences(preferences, model=backbone, processing_class=tokenizer, cache_dir=tmp_path)
    tokenizer_of_others = copy.deepcopy(tokenizer)
    tokenizer_of_others.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(RewardModelError, match="features with another tokenizer"):
        embed_preferences(preferences, model=backbone, processing_class=tokenizer_of_others, cache_dir=tmp_path)
    with torch.no_grad():
        next(iter(backbone.parameters())).add_(1)
    with pytest.raises(RewardModelError, match="features with another model"):
        embed_preferences(preferences, model=backbone, processing_class=tokenizer, cache_dir=tmp_path)
    nobody = preferences.remove_columns("user_id").add_column(
        "user_id", ["ada", None, "bob", "ada", "bob", "ada", "bob"]
    )
    with pytest.raises(RewardModelError, match="Row 1 has no user in its column 'user_id'"):
        embed_preferences(nobody, model=backbone, processing_class=tokenizer, cache_dir=tmp_path / "other")
    with pytest.raises(RewardModelError, match=r"no column \['user_id'\]"):
        embed_preferences(
            preferences.remove_columns("user_id"), model=backbone, processing_class=tokenizer, cache_dir=tmp_path
        )


def test_a_tokenizer_without_any_token_to_pad_with_is_refused(backbone):
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(RewardModelError, match="has neither a padding token nor an end token; set its pad_token"):
        embed_texts(backbone, bare, TEXTS)
