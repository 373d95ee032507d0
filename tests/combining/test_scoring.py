"""Choosing the multiplier by held-out rows, on real models made tiny."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from eigenpeft.combining import merge
from eigenpeft.combining.scoring import HeldOutTask, held_out_score
from eigenpeft.errors import AdapterConfigError
from tests.factories import tiny_bert, tiny_llama


def adapted(base, seed, **config):
    model = get_peft_model(base, LoraConfig(r=2, **config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator)
    return model


def test_the_score_finds_the_scale_that_the_labels_were_made_with(tmp_path):
    ids = torch.randint(3, 64, (64, 8), generator=torch.Generator().manual_seed(0))
    # The labels are what the adapter itself says: of all multipliers, 1 agrees with all of them.
    model = adapted(tiny_bert(), 0, target_modules=["query", "value"], task_type="SEQ_CLS")
    with torch.no_grad():
        labels = model(ids).logits.argmax(dim=1)
    model.save_pretrained(tmp_path / "task")
    base = tiny_bert()
    before = {name: parameter.clone() for name, parameter in base.named_parameters() if "classifier" not in name}
    batches = [{"input_ids": ids[:32], "labels": labels[:32]}, {"input_ids": ids[32:], "labels": labels[32:]}]
    score = held_out_score([HeldOutTask("task", base, batches)])
    merged = merge(tmp_path / "task", scale=[0.0, 1.0, 3.0], score=score, progress=False)
    assert merged.report.scale == 1.0
    scores = {entry["scale"]: entry["score"] for entry in merged.report.grid}
    assert scores[1.0] == 1.0
    assert scores[0.0] < 1.0
    assert all(torch.equal(dict(base.named_parameters())[name], value) for name, value in before.items())


def test_the_loss_of_a_language_model_is_a_score_too(tmp_path):
    ids = torch.randint(3, 64, (8, 8), generator=torch.Generator().manual_seed(0))
    adapted(tiny_llama(), 0, target_modules=["q_proj"]).save_pretrained(tmp_path / "task")
    batches = [{"input_ids": ids, "labels": ids}]
    score = held_out_score([HeldOutTask("rows", tiny_llama(), batches)], metric="loss")
    merged = merge(tmp_path / "task", progress=False)
    model = tiny_llama()
    merged.apply_to(model)
    with torch.no_grad():
        assert score(merged) == pytest.approx(-float(model(**batches[0]).loss), rel=1e-5)
    with pytest.raises(AdapterConfigError, match="metric='accuracy' needs one row of logits per example"):
        held_out_score([HeldOutTask("rows", tiny_llama(), batches)])(merged)


def test_unknown_metrics_are_named():
    with pytest.raises(AdapterConfigError, match="metric='f1' on 0 tasks; pass one of 'accuracy', 'loss'"):
        held_out_score([], metric="f1")
