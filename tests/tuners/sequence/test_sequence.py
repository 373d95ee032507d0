"""Tasks in sequence with a real Trainer: what stays off the history, what a resume repeats, and what is refused."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from eigenpeft import EigenLoraConfig
from eigenpeft.errors import AdapterConfigError, ArtifactError
from eigenpeft.tuners.sequence import OrthogonalSubspaceCallback, SubspaceHistory, collect_inputs, init_lora_from_inputs
from eigenpeft.tuners.sequence.history import input_factors
from tests.tuners.conftest import random_subspace, tiny_bert

RANK = 3
RAW = LoraConfig(r=2, target_modules=["0", "1"])


def adapted(seed=0, **changes):
    options = {"r": RANK, "target_modules": ["query"], "task_type": "SEQ_CLS", **changes}
    base = tiny_bert()
    torch.manual_seed(seed)  # the base has its own
    return get_peft_model(base, LoraConfig(**options))


def task(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 40, (24, 6), generator=generator)
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": (tokens[:, seed % 6] % 3).tolist()})


def trainer(model, folder, *callbacks, data=1, steps=6, **changes):
    options = {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 0.05, "report_to": "none"}
    options |= {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 1}
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **options | changes),
        train_dataset=task(data),
        callbacks=list(callbacks),
    )


def overlaps(model, history):
    """Largest cosine between a row of A and the history's span, by module."""
    found = {}
    for name, factor in input_factors(model, "default"):
        basis = torch.linalg.qr(history.rows[name].double().mT)[0].mT
        rows = factor.detach().double()
        found[name] = float((rows @ basis.mT).norm(dim=1).max() / rows.norm(dim=1).max())
    return found


@pytest.fixture
def history(tmp_path):
    """Of one task that a Trainer has trained."""
    model, history = adapted(), SubspaceHistory()
    trainer(model, tmp_path / "first", data=0).train()
    history.add(model)
    return history


def test_projection_keeps_a_off_the_history_and_learns(history, tmp_path):
    free, kept = adapted(1), adapted(1)
    trainer(free, tmp_path).train()
    start = {name: factor.detach().clone() for name, factor in input_factors(kept, "default")}
    trainer(kept, tmp_path, OrthogonalSubspaceCallback(history)).train()
    assert min(overlaps(free, history).values()) > 1e-2, "the control: without the callback it does overlap"
    assert max(overlaps(kept, history).values()) < 1e-6
    for name, factor in input_factors(kept, "default"):
        assert (factor - start[name]).norm() > 0.1
    # Inputs in the span of the history see no update at all.
    name, layer = next((n, m) for n, m in kept.named_modules() if n.endswith("layer.1.attention.self.query"))
    x = history.rows[name.removeprefix("base_model.model.")]
    with torch.no_grad():
        assert (layer(x) - layer.base_layer(x)).abs().max() < 1e-5
        assert (layer(torch.randn(4, 32)) - layer.base_layer(torch.randn(4, 32))).abs().max() > 1e-3


def test_the_penalty_is_that_of_the_loss(history, tmp_path):
    """One step of plain SGD with the callback and one with the penalty in the loss end at the same A."""
    options = {"optim": "sgd", "steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    by_callback, by_loss = adapted(2), adapted(2)
    trainer(by_callback, tmp_path, OrthogonalSubspaceCallback(history, mode="penalty", weight=0.3), **options).train()

    class WithPenalty(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs)
            for name, factor in input_factors(model, "default"):
                loss = loss + 0.3 * (history.rows[name] @ factor.mT).abs().sum()
            return loss

    plain = trainer(by_loss, tmp_path, **options)
    other = WithPenalty(model=by_loss, args=plain.args, train_dataset=task(1))
    other.train()
    for (name, one), (_, two) in zip(
        input_factors(by_callback, "default"), input_factors(by_loss, "default"), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
        assert (one - dict(input_factors(adapted(2), "default"))[name]).norm() > 1e-3


def test_the_penalty_lowers_the_overlap(history, tmp_path):
    free, kept = adapted(1), adapted(1)
    trainer(free, tmp_path, steps=20).train()
    trainer(kept, tmp_path, OrthogonalSubspaceCallback(history, mode="penalty"), steps=20).train()
    for name, free_overlap in overlaps(free, history).items():
        assert overlaps(kept, history)[name] < 0.7 * free_overlap


def test_a_resumed_training_ends_where_a_whole_one_does(history, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole, resumed = adapted(1), adapted(1)
    trainer(whole, tmp_path / "whole", OrthogonalSubspaceCallback(history), **saving).train()
    trainer(adapted(1), tmp_path / "part", OrthogonalSubspaceCallback(history), **saving).train()
    trainer(resumed, tmp_path / "part", OrthogonalSubspaceCallback(history), **saving).train(
        resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3")
    )
    for (_, one), (_, two) in zip(input_factors(whole, "default"), input_factors(resumed, "default"), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_inflora_never_touches_what_earlier_tasks_see(tmp_path):
    first, history = adapted(), SubspaceHistory(max_rows=24)
    tokens = torch.tensor(task(0)["input_ids"])
    batches = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}]
    history.add_inputs(collect_inputs(first, batches=batches), held_share=0.9)
    second = adapted(3)
    inputs = collect_inputs(second, batches=[{"input_ids": torch.tensor(task(1)["input_ids"])}], n_rows=100)
    assert {rows.shape for rows in inputs.values()} == {(100, 32)}
    counts = init_lora_from_inputs(second, inputs=inputs, history=history)
    assert set(counts.values()) == {RANK}
    start = {name: factor.detach().clone() for name, factor in input_factors(second, "default")}
    trainer(second, tmp_path).train()
    for name, factor in input_factors(second, "default"):
        assert torch.equal(factor, start[name]), "A is frozen"
    assert max(overlaps(second, history).values()) < 1e-5
    lora_B = [p.detach() for n, p in second.named_parameters() if "lora_B" in n]
    assert min(float(p.norm()) for p in lora_B) > 1e-2
    with pytest.raises(AdapterConfigError, match="There are no inputs of 2 modules"):
        init_lora_from_inputs(adapted(), inputs={}, history=history)
    full = SubspaceHistory()
    full.rows = {name: torch.eye(32) for name in inputs}
    with pytest.raises(AdapterConfigError, match="holds all directions of the task's inputs"):
        init_lora_from_inputs(adapted(), inputs=inputs, history=full)


def test_padding_is_no_input():
    model = adapted()
    tokens, mask = torch.arange(1, 13).reshape(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[1, 3:] = 0
    rows = collect_inputs(model, batches=[{"input_ids": tokens, "attention_mask": mask}])
    assert {len(each) for each in rows.values()} == {9}
    with pytest.raises(AdapterConfigError, match="pass at least one batch"):
        collect_inputs(model, batches=[])
    for n_rows in (0, -1, 2.0):
        with pytest.raises(AdapterConfigError, match=rf"n_rows={n_rows} must be a whole number of at least 1"):
            collect_inputs(model, batches=[{"input_ids": tokens}], n_rows=n_rows)


def test_a_history_is_bounded_saved_and_read(history, tmp_path):
    small = SubspaceHistory(max_rows=4)
    for seed in range(3):
        small.add(adapted(seed))
    assert {tuple(rows.shape) for rows in small.rows.values()} == {(4, 32)}
    history.save(tmp_path / "history.safetensors")
    loaded = SubspaceHistory.load(tmp_path / "history.safetensors")
    assert all(torch.equal(loaded.rows[name], rows) for name, rows in history.rows.items())
    with pytest.raises(ArtifactError, match="already exists"):
        history.save(tmp_path / "history.safetensors")
    (tmp_path / "history.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="cannot be read"):
        SubspaceHistory.load(tmp_path / "history.safetensors")


def test_cores_in_one_subspace_have_a_history_too(tmp_path):
    config = EigenLoraConfig(
        subspace=random_subspace(tiny_bert(), ("query",), n_components=12), r=2, task_type="SEQ_CLS"
    )
    first, history = get_peft_model(tiny_bert(), config), SubspaceHistory()
    history.add(first)
    assert {tuple(rows.shape) for rows in history.rows.values()} == {(2, 12)}
    second = get_peft_model(tiny_bert(), config)  # the same start, since tiny_bert seeds: it lies in the history
    trainer(second, tmp_path, OrthogonalSubspaceCallback(history)).train()
    assert max(overlaps(second, history).values()) < 1e-6


def test_what_cannot_work_is_named(history, tmp_path):
    with pytest.raises(AdapterConfigError, match="mode='soft' must be 'project' or 'penalty'"):
        OrthogonalSubspaceCallback(history, mode="soft")
    with pytest.raises(AdapterConfigError, match=r"weight=-1 must be 0 or more"):
        OrthogonalSubspaceCallback(history, weight=-1)
    with pytest.raises(AdapterConfigError, match="max_rows=0 must be a whole number"):
        SubspaceHistory(max_rows=0)
    with pytest.raises(AdapterConfigError, match="has no input factor A in any layer"):
        history.add(tiny_bert())
    with pytest.raises(AdapterConfigError, match="Use a history of the same base model"):
        trainer(adapted(target_modules=["value"]), tmp_path, OrthogonalSubspaceCallback(history)).train()
    full = SubspaceHistory()
    full.rows = {name: torch.eye(32) for name in history.rows}
    with pytest.raises(
        AdapterConfigError, match=r"spans 32 of the 32 input directions of .* leaves too few for an adapter of rank 3"
    ):
        trainer(adapted(), tmp_path, OrthogonalSubspaceCallback(full)).train()


def test_rows_of_another_model_are_refused_whole():
    model, name = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 4)), RAW), "1"
    history = SubspaceHistory()
    history.rows = {name: torch.eye(5)[:2]}
    message = r"rows of '1' have the shape \({}, 4\), and the history has rows of width 5 of it"
    with pytest.raises(AdapterConfigError, match=message.format(2)):
        history.add(model)
    with pytest.raises(AdapterConfigError, match=message.format(3)):
        history.add_inputs({"0": torch.eye(6), name: torch.eye(4)[:3]})
    with pytest.raises(AdapterConfigError, match=r"rows of '0' have the shape \(6,\); pass \(rows, in_features\)"):
        history.add_inputs({"0": torch.ones(6)})
    assert history.rows.keys() == {name}  # nothing of "0", which fits, was remembered
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = {"0": torch.eye(6), name: torch.eye(4)}
    with pytest.raises(
        AdapterConfigError, match=r"history of '1' has rows of the shape \(2, 5\), and its A is \(2, 4\)"
    ):
        init_lora_from_inputs(model, inputs=inputs, history=history)
    with pytest.raises(
        AdapterConfigError, match=r"inputs of '1' has rows of the shape \(7, 5\), and its A is \(2, 4\)"
    ):
        init_lora_from_inputs(model, inputs=inputs | {name: torch.ones(7, 5)}, history=SubspaceHistory())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
