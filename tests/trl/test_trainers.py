"""TRL's trainers with our methods: what must move moves, the reference is the model before training, losses start right."""

import math

import pytest
import torch

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
