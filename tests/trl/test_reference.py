"""The reference that TRL compares with is the model before training, also after training has moved it."""

import math

import pytest
import torch
from trl.trainer.utils import use_adapter

from tests.trl.trainers import Method, history, make_trainer

METHODS = ("eigenlora low_rank", "eigenlora mixer", "eigenlora diagonal", "moslora")
WITH_REFERENCE = ("dpo", "kto", "grpo", "rloo")
TOKENS = torch.arange(4, 24).reshape(2, 10)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits.clone()


@pytest.mark.parametrize("trained", [False, True], ids=["peft_config", "PeftModel"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_the_reference_is_the_model_before_training(kind, name, trained, subspace_folder, tmp_path):
    trainer = make_trainer(kind, Method(name, subspace_folder), tmp_path, trained=trained)
    model = trainer.model.eval()
    before = logits(model)
    reference = "ref" if "ref" in model.peft_config else None  # as the trainers choose it
    assert (reference == "ref") == trained
    if trained:  # off the base, or the test could not tell the reference from it
        with model.disable_adapter():
            assert not torch.allclose(logits(model), before, atol=1e-3)
    trainer.train()
    model.eval()
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with use_adapter(model, reference):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("trained", [False, True], ids=["peft_config", "PeftModel"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("kind", "metric", "start"),
    [("dpo", "loss", math.log(2)), ("kto", "loss", 0.5), ("grpo", "kl", 0.0), ("rloo", "kl", 0.0)],
    ids=["dpo", "kto", "grpo", "rloo"],
)
def test_the_first_step_starts_at_the_reference(kind, metric, start, name, trained, subspace_folder, tmp_path):
    trainer = make_trainer(kind, Method(name, subspace_folder), tmp_path, trained=trained)
    trainer.train()
    first, second = history(trainer, metric)[:2]
    assert first == pytest.approx(start, abs=2e-6)
    assert second != pytest.approx(start, abs=1e-5)  # and leaves it
