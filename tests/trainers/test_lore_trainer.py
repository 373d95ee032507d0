"""LoReTrainer: real training steps of RewardTrainer, with users, adapters, checkpoints and the finished model."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification

from eigenpeft import LowRankRewardModel, MosLoraConfig
from eigenpeft.errors import RewardModelError
from eigenpeft.reward import LoReFitter
from eigenpeft.reward.text.features import embed_texts
from eigenpeft.reward.text.rewards import classify
from eigenpeft.trainers import LoReConfig, LoReTrainer


def config(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "n_basis": 2,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 16,
        "max_steps": 60,
        "logging_steps": 20,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return LoReConfig(**{**defaults, **options})


def accuracy(model, data, tokenizer):
    """Share of comparisons that the finished model orders as their users do, on TRL's texts (with the end token)."""
    sides = [[row[side] + " </s>" for row in data] for side in ("chosen", "rejected")]
    chosen, rejected = (classify(model.backbone, tokenizer, texts, batch_size=32) for texts in sides)
    weights = model.user_weights(data["user_id"])
    return (((chosen - rejected) * weights).sum(dim=1) > 0).float().mean().item()


def test_it_tells_two_kinds_of_users_apart(make_model, tokenizer, data, tmp_path):
    train = data(range(8), 20)
    trainer = LoReTrainer(
        make_model(),
        config(tmp_path, learning_rate=1e-2, max_steps=150),
        train_dataset=train,
        eval_dataset={"seen": data(range(8), 5, seed=1), "new": data(range(4), 5, seed=2, name="new")},
        processing_class=tokenizer,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_seen_accuracy"] > 0.95
    assert metrics["eval_seen_gain_over_population"] == pytest.approx(
        metrics["eval_seen_accuracy"] - metrics["eval_seen_population_accuracy"]
    )
    assert metrics["eval_seen_gain_over_population"] > 0.3
    assert metrics["eval_new_gain_over_population"] == pytest.approx(0.0)

    model = trainer.reward_model()
    assert len(model.users) == 8
    assert accuracy(model, data(range(8), 5, seed=3), tokenizer) > 0.95
    weights = model.user_weights(["user-0", "user-2", "user-1"])
    assert (weights[0] - weights[1]).abs().max() < (weights[0] - weights[2]).abs().max()

    model.save_pretrained(tmp_path / "reward")
    again = LowRankRewardModel.from_pretrained(tmp_path / "reward")
    assert accuracy(again, data(range(8), 5, seed=3), tokenizer) > 0.95
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert stock.config.num_labels == 2
    assert not stock._forward_hooks


@pytest.mark.parametrize("adapter", [LoraConfig, MosLoraConfig])
def test_with_an_adapter_on_the_backbone(adapter, llama, tokenizer, data, tmp_path):
    backbone = llama()
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    trainer = LoReTrainer(
        backbone,
        config(tmp_path, learning_rate=1e-2),
        train_dataset=data(range(6), 20),
        processing_class=tokenizer,
        peft_config=adapter(r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="SEQ_CLS"),
    )
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any("lore_user_logits" in name for name in trainable)
    assert any("score" in name for name in trainable)
    assert all("lora" in name or "score" in name or "lore_user_logits" in name or "mixer" in name for name in trainable)
    trainer.train()
    model = trainer.reward_model()
    assert accuracy(model, data(range(6), 5, seed=3), tokenizer) > 0.9
    changed = model.backbone.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(changed, before["layers.0.self_attn.q_proj.weight"]), (
        "the adapter is not in the finished model"
    )
    assert type(model.backbone).__name__ == "LlamaForSequenceClassification"


@pytest.mark.parametrize("adapter", [None, LoraConfig], ids=["full", "LoRA"])
@pytest.mark.parametrize("autocast", [False, True])
def test_over_a_bfloat16_model_small_steps_are_not_lost(adapter, autocast, llama, tokenizer, data, tmp_path):
    model = llama().to(torch.bfloat16)
    trainer = LoReTrainer(
        model,
        config(tmp_path, learning_rate=1e-5, max_steps=3, bf16=autocast),
        train_dataset=data(range(4), 8),
        processing_class=tokenizer,
        peft_config=None if adapter is None else adapter(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"),
    )
    trainer.train()
    finished = trainer.reward_model()
    trained = [p for name, p in trainer.model.named_parameters() if "score" in name and p.requires_grad]
    assert [p.dtype for p in trained] == [torch.float32]
    basis = trained[0].detach()
    assert not torch.equal(basis, basis.bfloat16().float())  # finer than bfloat16 can say
    assert torch.equal(finished.reward_basis, basis)
    assert {p.dtype for p in finished.backbone.parameters()} == {torch.bfloat16}
    assert not finished.backbone.score._forward_pre_hooks
    assert classify(finished.backbone, tokenizer, ["a text"], batch_size=1).shape == (1, 2)


def test_a_frozen_backbone_stays(llama, tokenizer, data, tmp_path):
    trainer = LoReTrainer(
        llama(),
        config(tmp_path, freeze_backbone=True, learning_rate=5e-2),
        train_dataset=data(range(6), 20),
        processing_class=tokenizer,
    )
    trainer.train()
    model = trainer.reward_model()
    assert torch.equal(model.backbone.model.embed_tokens.weight, llama().model.embed_tokens.weight)
    assert accuracy(model, data(range(6), 5, seed=3), tokenizer) > 0.8


def test_checkpoints_hold_the_users_and_training_goes_on(llama, tokenizer, data, tmp_path):
    def trainer(**options):
        return LoReTrainer(
            llama(),
            config(tmp_path, save_strategy="steps", save_steps=10, **options),
            train_dataset=data(range(4), 20),
            processing_class=tokenizer,
        )

    whole = trainer(max_steps=20)
    whole.train()
    resumed = trainer(max_steps=20)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-10"))
    first, second = whole.reward_model(), resumed.reward_model()
    torch.testing.assert_close(second.reward_basis, first.reward_basis, atol=1e-5, rtol=1e-4)
    users = [f"user-{i}" for i in range(4)]
    torch.testing.assert_close(second.user_weights(users), first.user_weights(users), atol=1e-5, rtol=1e-4)


def test_a_scalar_reward_model_is_the_start_of_every_row(llama, tokenizer, data, tmp_path):
    scalar = llama()
    trainer = LoReTrainer(
        scalar, config(tmp_path, n_basis=3), train_dataset=data(range(4), 5), processing_class=tokenizer
    )
    basis = trainer.reward_model().reward_basis
    assert basis.shape == (3, 16)
    assert torch.nn.functional.cosine_similarity(basis, scalar.score.weight).min() > 0.4
    assert scalar.config.num_labels == 1
    assert not hasattr(scalar, "lore_user_logits")


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_a_fitted_reward_model(adapter, dtype, llama, tokenizer, data, tmp_path):
    train = data(range(6), 10)
    backbone = llama().to(dtype)
    sides = [
        embed_texts(backbone, tokenizer, [row[side] + " </s>" for row in train]) for side in ("chosen", "rejected")
    ]
    fitter = LoReFitter(n_basis=2, deviation_scale=2.0, strength=1.0)
    fitted = fitter.fit(*sides, user_ids=train["user_id"], backbone=backbone, processing_class=tokenizer).model_
    fitted.remove_user("user-5")
    before = {name: value.clone() for name, value in fitted.backbone.state_dict().items()}
    trainer = LoReTrainer(fitted, config(tmp_path, max_steps=1), train_dataset=train, peft_config=adapter)
    start = trainer.reward_model()
    torch.testing.assert_close(start.reward_basis, fitted.reward_basis)
    users = [f"user-{i}" for i in range(5)]
    torch.testing.assert_close(start.user_weights(users), fitted.user_weights(users), atol=2e-3, rtol=0)
    torch.testing.assert_close(start.user_weights(["user-5"])[0], fitted.population_weights, atol=2e-3, rtol=0)
    known = train.filter(lambda row: row["user_id"] != "user-5")
    assert accuracy(start, known, tokenizer) == accuracy(fitted, known, tokenizer) > 0.8
    trainer.train()
    assert not torch.equal(trainer.reward_model().reward_basis, fitted.reward_basis)
    assert all(torch.equal(value, before[name]) for name, value in fitted.backbone.state_dict().items())


def test_a_model_by_name_with_a_head_or_without(llama, tokenizer, data, tmp_path):
    scalar = llama()
    scalar.save_pretrained(tmp_path / "scalar")
    scalar.model.save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "scalar")
    tokenizer.save_pretrained(tmp_path / "bare")
    for name, is_start in (("scalar", True), ("bare", False)):
        trainer = LoReTrainer(str(tmp_path / name), config(tmp_path, n_basis=3), train_dataset=data(range(4), 5))
        model = trainer.reward_model()
        assert torch.equal(model.backbone.model.embed_tokens.weight, scalar.model.embed_tokens.weight)
        similar = torch.nn.functional.cosine_similarity(model.reward_basis, scalar.score.weight).min() > 0.4
        assert similar == is_start


def test_users_have_a_learning_rate_of_their_own(llama, tokenizer, data, tmp_path):
    trainer = LoReTrainer(
        llama(),
        config(tmp_path, user_learning_rate=0.123),
        train_dataset=data(range(4), 5),
        processing_class=tokenizer,
    )
    groups = trainer.create_optimizer().param_groups
    mine = [group for group in groups if any(p.shape == (4, 2) for p in group["params"])]
    assert [group["lr"] for group in mine] == [0.123]
    everything = [id(p) for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == sum(1 for p in trainer.model.parameters() if p.requires_grad)


def test_conversations(llama, tokenizer, data, tmp_path):
    chat = data(range(4), 5).map(
        lambda row: {
            "prompt": [{"role": "user", "content": "a joke please"}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
    )
    trainer = LoReTrainer(llama(), config(tmp_path, max_steps=2), train_dataset=chat, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2


def test_streaming_needs_the_users(llama, tokenizer, data, tmp_path):
    rows = data(range(2), 10)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(RewardModelError, match="pass user_ids"):
        LoReTrainer(llama(), config(tmp_path), train_dataset=stream, processing_class=tokenizer)
    trainer = LoReTrainer(
        llama(),
        config(tmp_path, max_steps=2),
        train_dataset=stream,
        processing_class=tokenizer,
        user_ids=["user-0", "user-1"],
    )
    trainer.train()
    assert len(trainer.reward_model().users) == 2


def test_errors(llama, tokenizer, data, tmp_path):
    with pytest.raises(RewardModelError, match="needs a train_dataset"):
        LoReTrainer(llama(), config(tmp_path), processing_class=tokenizer)
    without = Dataset.from_dict({"chosen": ["a"], "rejected": ["the"]})
    with pytest.raises(RewardModelError, match="no column 'user_id', only"):
        LoReTrainer(llama(), config(tmp_path), train_dataset=without, processing_class=tokenizer)
    fitted = {"train_dataset": data(range(2), 2), "processing_class": tokenizer}
    with pytest.raises(RewardModelError, match="to start from has no backbone"):
        LoReTrainer(LowRankRewardModel(torch.eye(2)), config(tmp_path), **fitted)
    with pytest.raises(RewardModelError, match="a basis of 3, and n_basis=2; they must agree"):
        LoReTrainer(LowRankRewardModel(torch.eye(3, 16), backbone=llama()), config(tmp_path), **fitted)
    with pytest.raises(RewardModelError, match=r"has 3 labels; LoReTrainer takes 1 .* or n_basis=2"):
        LoReTrainer(llama(3), config(tmp_path), train_dataset=data(range(2), 2), processing_class=tokenizer)
    for name, rule in (
        ("n_basis", "at least 1; 1"),
        ("user_learning_rate", "above 0; leave"),
        ("strength", "above 0; the"),
    ):
        with pytest.raises(ValueError, match=f"{name}=0 is out of range: it must be {rule}"):
            config(tmp_path, **{name: 0})
    with pytest.raises(
        ValueError, match="concentration=-1 is out of range: it must be at least 0; 0 leaves the prior out"
    ):
        config(tmp_path, concentration=-1)
