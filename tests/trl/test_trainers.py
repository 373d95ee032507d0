"""TRL's trainers with our methods: what must move moves, the reference is the model before training, losses start right."""

import math

import pytest
import torch

from tests.trl import trainers
from tests.trl.trainers import CORES, Method, history, make_trainer

CASES = [
    *[(trainer, f"eigenlora {core}") for trainer in ("sft", "dpo") for core in CORES],
    *[(trainer, "eigenlora low_rank") for trainer in ("kto", "reward", "grpo", "rloo", "distillation")],
    *[(trainer, "moslora") for trainer in ("sft", "dpo", "kto", "reward", "grpo", "rloo", "distillation")],
]
STARTS = pytest.mark.parametrize("trained", [False, True], ids=["peft_config", "PeftModel"])


@STARTS
@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind}-{name}" for kind, name in CASES])
def test_every_trainable_tensor_moves_and_nothing_else(kind, name, trained, subspace_folder, tmp_path):
    trainer = make_trainer(kind, Method(name, subspace_folder), tmp_path, trained=trained)
    before = {key: tensor.detach().clone() for key, tensor in trainer.model.state_dict().items()}
    trainable = {key for key, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable
    trainer.train()
    moved = {key for key, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved == trainable
    assert all(math.isfinite(loss) for loss in history(trainer, "loss"))


@pytest.mark.parametrize("name", ["eigenlora low_rank", "eigenlora mixer", "moslora"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_gradient_checkpointing_changes_nothing(kind, name, subspace_folder, tmp_path):
    """TRL's default, which recomputes activations, and needs inputs that require gradients."""
    method = Method(name, subspace_folder)
    losses = []
    for checkpointing in (False, True):
        trainer = make_trainer(kind, method, tmp_path, gradient_checkpointing=checkpointing, max_steps=3)
        trainer.train()
        losses.append(history(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["eigenlora low_rank", "eigenlora mixer", "eigenlora diagonal", "moslora"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_bfloat16_base_trains_float32_tensors(kind, name, subspace_folder, tmp_path, monkeypatch):
    make_base = trainers.tiny_model
    monkeypatch.setattr(trainers, "tiny_model", lambda kind: make_base(kind).to(torch.bfloat16))
    trainer = make_trainer(kind, Method(name, subspace_folder), tmp_path)
    trained = {key: p.detach().clone() for key, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    trainer.train()
    assert all(not torch.equal(start, trainer.model.get_parameter(key)) for key, start in trained.items())
