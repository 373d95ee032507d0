"""Artifacts written in format 1 (before the version that brought format 2) load and give the numbers they gave then."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from eigenpeft import AdapterStore, LowRankRewardModel, PrincipalSubspace

SAVED = Path(__file__).parent / "data" / "format_1"
EXPECTED = load_file(SAVED / "expected.safetensors")
TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture
def base():
    config = BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
        num_labels=3,
        max_position_embeddings=32,
    )
    model = BertForSequenceClassification(config)
    model.load_state_dict(load_file(SAVED / "base.safetensors"))
    return model.eval()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy, as the current folder: the adapters name their subspace by a relative path."""
    shutil.copytree(SAVED, tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "saved")
    return tmp_path / "saved"


def test_store_gives_the_same_updates(folder):
    store = AdapterStore.from_pretrained(folder / "store")
    assert store.subspace.fingerprint == PrincipalSubspace.from_pretrained(folder / "subspace").fingerprint
    assert store.names == ("adapter-0", "adapter-1", "adapter-2")
    for name in store.names:
        for module in store.subspace:
            lora_B, lora_A = store.factors(name, module=module)
            torch.testing.assert_close(lora_B @ lora_A, EXPECTED[f"store.{name}.{module}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("core", ["low_rank", "mixer", "diagonal"])
def test_eigenlora_adapters_give_the_same_logits(folder, base, core):
    model = PeftModel.from_pretrained(base, folder / core).eval()
    torch.testing.assert_close(model(TOKENS).logits, EXPECTED[f"eigenlora.{core}"], rtol=1e-6, atol=1e-6)


def test_moslora_adapter_gives_the_same_logits(folder, base):
    model = PeftModel.from_pretrained(base, folder / "moslora").eval()
    torch.testing.assert_close(model(TOKENS).logits, EXPECTED["moslora"], rtol=1e-6, atol=1e-6)


def test_reward_model_gives_the_same_scores(folder):
    model = LowRankRewardModel.from_pretrained(folder / "reward")
    scores = torch.stack([EXPECTED["reward.features"] @ model.reward_head(user) for user in ("ada", "bob")])
    torch.testing.assert_close(scores, EXPECTED["reward.scores"], rtol=1e-6, atol=1e-6)
