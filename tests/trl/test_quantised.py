"""Over a quantised base TRL rounds what is trained to bfloat16; the callback undoes it before the optimizer exists."""

import pytest
import torch

from eigenpeft.tuners.precision import KeepFloat32
from tests.trl import trainers
from tests.trl.trainers import Method, make_trainer, tiny_model

METHODS = ("eigenlora low_rank", "eigenlora mixer", "moslora")


def marked_quantised(kind):
    """No quantisation back-end is installed here; the mark is what TRL looks at before it casts."""
    model = tiny_model(kind)
    model.is_loaded_in_8bit = True
    return model


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "grpo"])
@pytest.mark.parametrize("name", METHODS)
def test_the_callback_restores_float32(kind, name, subspace_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trainers, "tiny_model", marked_quantised)
    without = make_trainer(kind, Method(name, subspace_folder), tmp_path)
    assert {p.dtype for p in without.model.parameters() if p.requires_grad} == {
        torch.bfloat16
    }  # what it guards against
    trainer = make_trainer(kind, Method(name, subspace_folder), tmp_path, callbacks=[KeepFloat32()])
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all(not torch.equal(before[key], trainer.model.get_parameter(key)) for key in before)
