"""transformers' Trainer with our adapters: it trains, checkpoints, and a resumed run ends where an unbroken one does."""

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from eigenpeft import EigenLoraConfig, MosLoraConfig
from tests.tuners.conftest import VOCABULARY, random_subspace, tiny_llama

CONFIGS = {
    "eigenlora": lambda subspace: EigenLoraConfig(subspace=subspace, r=4, task_type="CAUSAL_LM"),
    "eigenlora full": lambda subspace: EigenLoraConfig(subspace=subspace, r=4, core="full", task_type="CAUSAL_LM"),
    "moslora": lambda subspace: MosLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


def trainer_of(kind, folder, *, steps=6):
    rows = torch.randint(3, VOCABULARY, (12, 7), generator=torch.Generator().manual_seed(2)).tolist()
    subspace = random_subspace(tiny_llama(), ["q_proj"])
    subspace.save_pretrained(folder / "subspace")
    torch.manual_seed(5)
    return Trainer(
        model=get_peft_model(tiny_llama(), CONFIGS[kind](subspace)),
        args=TrainingArguments(
            output_dir=str(folder / "runs"),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            save_steps=3,
            logging_steps=1,
            report_to="none",
            seed=0,
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path, kind):
    whole = trainer_of(kind, tmp_path)
    before = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    whole.train()
    moved = {name for name, p in whole.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in whole.model.named_parameters() if p.requires_grad}
    resumed = trainer_of(kind, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-3"))
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, whole.model.get_parameter(name), rtol=0, atol=0)
    losses = [[row["loss"] for row in each.state.log_history if "loss" in row] for each in (whole, resumed)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_checkpoint_is_an_adapter(tmp_path, kind):
    trainer = trainer_of(kind, tmp_path)
    trainer.train()
    checkpoint = tmp_path / "runs" / "checkpoint-6"
    assert json.loads((checkpoint / "adapter_config.json").read_text())["requires_package"] == "eigenpeft"
    loaded = PeftModel.from_pretrained(tiny_llama(), checkpoint)
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, trainer.model.eval()(tokens).logits)
