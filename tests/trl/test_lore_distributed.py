"""Two processes (gloo) of LoReTrainer with half a batch each do what one process does with the whole batch."""

import os

import pytest
import torch
from peft import LoraConfig
from torch import distributed

from eigenpeft.trainers import LoReConfig, LoReTrainer
from tests.processes import in_processes
from tests.reward.conftest import tiny_llama, tokenizer
from tests.trainers.conftest import comparisons

__all__ = ["tokenizer"]


def make_trainer(folder, tokenizer, *, adapter, batch_size):
    torch.manual_seed(3)
    config = LoReConfig(
        str(folder),
        n_basis=2,
        learning_rate=1e-3,
        max_steps=6,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        logging_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    return LoReTrainer(
        tiny_llama(),
        config,
        train_dataset=comparisons(range(5), 12),
        eval_dataset=comparisons(range(5), 8, seed=1),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS") if adapter else None,
    )


def found(trainer):
    """What training left: every trained parameter, the finished model's users and basis, the metrics."""
    trainer.train()
    metrics = trainer.evaluate()
    model = trainer.reward_model()
    history = [log for log in trainer.state.log_history if "population_accuracy" in log]
    return {
        "trained": {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad},
        "basis": model.reward_basis,
        "weights": model.user_weights([f"user-{i}" for i in range(5)]),
        "metrics": {key: metrics[f"eval_{key}"] for key in ("loss", "accuracy", "population_accuracy")},
        "logged": {key: [log[key] for log in history] for key in ("loss", "accuracy", "population_accuracy")},
    }


def worker(rank, adapter, tokenizer, folder):
    # The group is there already (a file); accelerate only asks that the variables of a launcher be set.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    trainer = make_trainer(folder, tokenizer, adapter=adapter, batch_size=4)
    assert trainer.accelerator.num_processes == 2
    torch.save(found(trainer), f"{folder}/rank{rank}.pt")
    distributed.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True], ids=["whole model", "LoRA"])
def test_two_processes_equal_one(adapter, tokenizer, tmp_path):
    (tmp_path / "two").mkdir()
    in_processes(worker, adapter, tokenizer, folder=tmp_path / "two")
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    start = make_trainer(tmp_path / "one", tokenizer, adapter=adapter, batch_size=8)
    before = {name: p.detach().clone() for name, p in start.model.named_parameters() if p.requires_grad}
    one = found(start)
    names = {name.removeprefix("module.") for name in first["trained"]}
    assert names == set(one["trained"])
    assert names
    for name, value in first["trained"].items():
        name = name.removeprefix("module.")
        assert torch.equal(value, second["trained"][name]), name
        torch.testing.assert_close(value, one["trained"][name], atol=2e-6, rtol=1e-4)
        assert "lora_A" in name or (value - before[name]).abs().max() > 1e-4, f"{name} was not trained"
    for key in ("basis", "weights"):
        torch.testing.assert_close(first[key], one[key], atol=2e-6, rtol=1e-4)
    assert first["metrics"] == pytest.approx(one["metrics"], abs=1e-5)
    for key, values in one["logged"].items():
        assert first["logged"][key] == pytest.approx(values, abs=2e-4), key
