"""export of a trained adapter's folder: a plain LoRA with the same logits and head; what is not an adapter gets one message."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from eigenpeft import AdapterStore, EigenLoraConfig, MosLoraConfig
from tests.tuners.conftest import random_subspace

TARGETS = ["query", "value"]


def classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes)).eval()


def trained(config):
    model = get_peft_model(classifier(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(2, 6)).logits


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_subspace(classifier(), TARGETS).save_pretrained("subspace")
    return tmp_path


@pytest.mark.parametrize("core", ["low_rank", "full", "diagonal"])
def test_a_trained_folder_becomes_a_plain_lora(run, place, core):
    model = trained(EigenLoraConfig(subspace="subspace", core=core, r=2, task_type="SEQ_CLS"))
    model.save_pretrained("my-task")
    ran = run("export", "my-task", "--out", "lora")
    assert ran.code == 0, ran.err
    loaded = PeftModel.from_pretrained(classifier(), "lora")
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert (logits(model) - logits(classifier())).abs().max() > 0.01
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)


def test_what_cannot_be_exported_is_one_message(run, place):
    trained(EigenLoraConfig(subspace="subspace", r=2, task_type="SEQ_CLS", save_subspace="embed")).save_pretrained(
        "own"
    )
    trained(MosLoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS")).save_pretrained("mixed")
    trained(LoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS")).save_pretrained("plain")
    model = trained(EigenLoraConfig(subspace="subspace", r=2, task_type="SEQ_CLS"))
    model.save_pretrained("my-task")
    store = AdapterStore(random_subspace(classifier(), TARGETS))
    store.add(model, name="one")
    store.save_pretrained("store")
    for words, message in (
        (("own",), "holds its bases in its own file"),
        (("mixed",), "peft_type 'MOSLORA'; this command exports EIGENLORA: load it with PEFT"),
        (("plain",), "a plain LoRA needs no export"),
        (("my-task", "one"), "'my-task' is one adapter, no store; leave out the name 'one'"),
        (("store",), "Which adapter of the store 'store'? Name one of its 1: 'one'"),
        (("nowhere", "one"), "No adapter store at 'nowhere'"),
        (("store", "one", "--format", "onnx"), "--format 'onnx' must be peft or gguf"),
        (("store", "one", "--model", "base"), "--model is read for --format gguf alone; leave it out"),
    ):
        ran = run("export", *words, "--out", "lora")
        assert ran.code == 1
        assert message in ran.err.replace("\n", " "), ran.err
        assert not (place / "lora").exists()
