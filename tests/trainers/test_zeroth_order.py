"""Training by forward passes in the Trainer's own loop: the estimate it writes, what it learns, what it keeps, what it refuses."""

import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from eigenpeft import EigenLoraConfig
from eigenpeft.errors import AdapterConfigError
from eigenpeft.trainers import ZerothOrderTrainer, zeroth_order
from tests.tuners.conftest import random_subspace, tiny_bert


def task(number=32):
    """Rows whose label is in their first token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (number, 6), generator=generator)
    labels = torch.arange(number) % 3
    ids[:, 1] = labels * 10 + 10
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def adapted(core="diagonal", n_components=8):
    base = tiny_bert()
    torch.manual_seed(0)
    subspace = random_subspace(base, ("query", "value"), n_components=n_components)
    return get_peft_model(base, EigenLoraConfig(subspace=subspace, core=core, r=8, lora_alpha=8, task_type="SEQ_CLS"))


def arguments(tmp_path, **settings):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": [], "seed": 3}
    defaults |= {"disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "use_cpu": True}
    return TrainingArguments(output_dir=str(tmp_path), **defaults | settings)


def loss_of(model, rows):
    with torch.no_grad():
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        return float(model.eval()(**batch).loss)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_many_directions_give_the_gradient_that_backward_gives(tmp_path):
    model, rows = adapted(n_components=4), task(8)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)  # 16 numbers
    trainer = ZerothOrderTrainer(
        model=model, args=arguments(tmp_path), train_dataset=rows, n_directions=16, epsilon=0.3
    )
    trainer.current_gradient_accumulation_steps = 1
    before = trained(model)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    trainer.training_step(model, batch)
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(p, before[name]) for name, p in trained(model).items())
    model.zero_grad()
    model.eval()(**batch).loss.backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert float(torch.cosine_similarity(found, exact, dim=0)) > 0.999
    assert float(found @ exact / (exact @ exact)) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_the_loss_falls_and_the_base_stays(tmp_path, optimizer):
    model, rows = adapted(), task()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    rate = {"adamw_torch": 5e-2, "sgd": 1.0}[optimizer]
    settings = {"max_steps": 80, "optim": optimizer, "learning_rate": rate, "per_device_train_batch_size": 32}
    before = loss_of(model, rows)
    ZerothOrderTrainer(model=model, args=arguments(tmp_path, **settings), train_dataset=rows, epsilon=1e-2).train()
    assert loss_of(model, rows) < before - 0.1
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_a_score_without_a_gradient_is_an_objective(tmp_path):
    """The number of wrong answers, whose gradient is zero everywhere."""
    model, rows = adapted(core="full", n_components=6), task()

    def wrong(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        return (logits.argmax(dim=-1) != batch["labels"]).float().mean()

    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    before = float(wrong(model.eval(), batch))
    settings = {"max_steps": 60, "per_device_train_batch_size": 32, "learning_rate": 5e-2, "max_grad_norm": 1.0}
    trainer = ZerothOrderTrainer(
        model=model,
        args=arguments(tmp_path, **settings),
        train_dataset=rows,
        objective=wrong,
        epsilon=0.3,
        n_directions=2,
    )
    trainer.train()
    assert before > 0.5
    assert float(wrong(model.eval(), batch)) < before - 0.1


def test_accumulated_parts_are_those_of_a_whole_batch(tmp_path):
    """The mean of two halves along the same directions is the whole."""
    values = []
    for parts, size in ((1, 16), (2, 8)):
        model, rows = adapted(), task(16)
        trainer = ZerothOrderTrainer(model=model, args=arguments(tmp_path), train_dataset=rows)
        trainer._seed = lambda: 7
        trainer.current_gradient_accumulation_steps = parts
        for part in range(parts):
            chosen = rows[part * size : (part + 1) * size]
            trainer.training_step(model, {key: torch.stack([row[key] for row in chosen]) for key in rows[0]})
        values.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(values[0], values[1], rtol=2e-2, atol=2e-3)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path):
    found = []
    for folder, stops in (("whole", ()), ("parts", (3,))):
        model, rows = adapted(), task()
        settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "optim": "sgd"}
        settings = arguments(tmp_path / folder, **settings)
        for stop in stops:
            first = ZerothOrderTrainer(model=model, args=settings, train_dataset=rows)
            first.args.max_steps = stop
            first.args.lr_scheduler_type = "constant"
            first.train()
            model = adapted()
            settings.max_steps = 6
        settings.lr_scheduler_type = "constant"
        last = ZerothOrderTrainer(model=model, args=settings, train_dataset=rows)
        last.train(resume_from_checkpoint=bool(stops) or None)
        found.append(trained(last.model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_trained_so_is_refused(tmp_path):
    model, rows = adapted(), task()
    for change, message in (
        ({"epsilon": 0.0}, r"epsilon=0.0 must be above 0"),
        ({"n_directions": 0}, r"n_directions=0 at least 1"),
    ):
        with pytest.raises(AdapterConfigError, match=message):
            ZerothOrderTrainer(model=model, args=arguments(tmp_path), train_dataset=rows, **change)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(AdapterConfigError, match="The model has no trained values"):
        ZerothOrderTrainer(model=model, args=arguments(tmp_path), train_dataset=rows)
    settings = arguments(tmp_path)
    settings.fp16 = True
    with pytest.raises(AdapterConfigError, match="fp16=True: gradients are written here without a backward pass"):
        ZerothOrderTrainer(model=adapted(), args=settings, train_dataset=rows)


def test_an_objective_that_is_no_number_is_refused_and_the_values_are_kept(tmp_path):
    model, rows = adapted(), task()
    before = trained(model)
    trainer = ZerothOrderTrainer(
        model=model, args=arguments(tmp_path), train_dataset=rows, objective=lambda model, batch: float("nan")
    )
    with pytest.raises(AdapterConfigError, match="The objective is nan at step 0"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trained(model).items())


def test_many_values_are_warned_about(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(zeroth_order, "_MANY", 10)
    monkeypatch.setattr(zeroth_order._logger, "propagate", True)
    with caplog.at_level("WARNING", logger=zeroth_order.__name__):
        ZerothOrderTrainer(model=adapted(), args=arguments(tmp_path), train_dataset=task())
    assert "values are trained without gradients" in caplog.text


def test_it_is_a_trainer_and_needs_no_trl():
    assert issubclass(ZerothOrderTrainer, Trainer)
    script = (
        "import sys; sys.modules['trl'] = None\n"
        "from eigenpeft.trainers import ZerothOrderTrainer\n"
        "print(ZerothOrderTrainer.__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900)
    assert ran.stdout.strip() == "ZerothOrderTrainer", ran.stderr
