"""Features: what the head reads, whatever the batch; cached in parts that an interrupted run leaves behind."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel

from eigenpeft.errors import RewardModelError
from eigenpeft.reward import LoReFitter
from eigenpeft.reward.text.backbone import reference_head, score_head
from eigenpeft.reward.text.features import embed_preferences, embed_texts
from eigenpeft.reward.text.rewards import classify

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
    found = embed_preferences(preferences, backbone, tokenizer, **options)
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
    for name in ("part-000001", "part-000002"):
        for file in (tmp_path / "features" / name).iterdir():
            file.unlink()
        (tmp_path / "features" / name).rmdir()
    again = embed_preferences(preferences, backbone, tokenizer, **options)
    assert calls == [6, 2]
    assert (again["chosen"][:] == found["chosen"][:]).all()
    embed_preferences(preferences, backbone, tokenizer, **options)
    assert calls == [6, 2]


def test_a_cache_of_something_else_is_refused(backbone, tokenizer, preferences, tmp_path):
    embed_preferences(preferences, backbone, tokenizer, cache_dir=tmp_path)
    with pytest.raises(RewardModelError, match="features with another texts, n_comparisons"):
        embed_preferences(preferences.select(range(3)), backbone, tokenizer, cache_dir=tmp_path)
    with torch.no_grad():
        score_head(backbone)[1].weight.add_(1)
    with pytest.raises(RewardModelError, match="features with another model"):
        embed_preferences(preferences, backbone, tokenizer, cache_dir=tmp_path)
    with pytest.raises(RewardModelError, match=r"no column \['user_id'\]"):
        embed_preferences(preferences.remove_columns("user_id"), backbone, tokenizer, cache_dir=tmp_path)
