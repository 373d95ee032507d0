"""Classifiers of six repositories: projected, exported, and loaded by plain PEFT with their heads."""

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2ForSequenceClassification

from eigenpeft import AdapterCollection, AdapterStore, SubspaceBuilder, export_lora

pytestmark = pytest.mark.slow
# Adapter to its number of classes. Their ranks are 8 and 1, their alphas 1, 8, 16 and 32; one is a .bin; four adapt c_attn
# alone, two c_proj too.
CLASSIFIERS = {"anirudh-ak": 6, "b-ritter": 4, "goutham": 2, "hitoshi": 2, "stathopoan": 6, "thesotti": 3}
TOKENS = torch.arange(24).view(2, 12) * 7 + 1


def logits_of(folder, n_labels):
    """Of a GPT-2 with random weights, since its own are not at hand, with an adapter that PEFT loads."""
    torch.manual_seed(0)
    base = GPT2ForSequenceClassification(GPT2Config(num_labels=n_labels, pad_token_id=0))
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad(), model.disable_adapter():
        without = model(TOKENS).logits
    with torch.no_grad():
        return model(TOKENS).logits, without


@pytest.fixture(scope="module")
def collection(real_adapters_dir):
    with AdapterCollection.from_pretrained([real_adapters_dir / name for name in CLASSIFIERS]) as opened:
        yield opened


ALL = {"*.c_attn": 41, "*.attn.c_proj": 16, "*": 8}  # as many as the ranks add up to: nothing is lost
SOME = {"*.c_attn": 12, "*": 6}


@pytest.mark.parametrize("n_components", [ALL, SOME], ids=["all", "some"])
def test_they_come_out_of_a_store_as_they_went_in(collection, real_adapters_dir, tmp_path, n_components):
    subspace = SubspaceBuilder(n_components=n_components).fit(collection).subspace_
    AdapterStore.from_collection(subspace, collection).save_pretrained(tmp_path / "store")
    store = AdapterStore.from_pretrained(tmp_path / "store")
    for name, n_labels in CLASSIFIERS.items():
        export_lora(store, tmp_path / name, adapter_name=name)
        expected, without = logits_of(real_adapters_dir / name, n_labels)
        found, _ = logits_of(tmp_path / name, n_labels)
        error = max(store[name].relative_errors.values())
        effect, difference = (expected - without).abs().max(), (found - expected).abs().max()
        assert effect > 100 * 1e-4, f"{name} changes too little to tell anything: {effect}"
        if n_components is ALL:
            assert error < 1e-4
            assert difference < 1e-4 * max(1.0, float(expected.abs().max())), name
        else:
            assert 0 < error < 1
            assert difference <= 3 * error * effect + 1e-4, (name, float(error), float(effect), float(difference))
