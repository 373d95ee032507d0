"""Every stable TRL trainer trains our coefficients and nothing else, against a reference that is the model before."""

import math

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from tests.trl.conftest import CONFIGS, SETUPS, byte_tokenizer, first, make_trainer, tiny_base, trained

pytestmark = pytest.mark.filterwarnings("default")  # TRL's and accelerate's warnings are theirs

IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(5))
# What the first logged value must be when the reference equals the model: logsigmoid(0), 1 - sigmoid(0), KL 0.
AT_THE_REFERENCE = {"dpo": ("loss", math.log(2)), "kto": ("loss", 0.5), "grpo": ("kl", 0.0), "rloo": ("kl", 0.0)}


@torch.no_grad()
def logits(model):
    was_training = model.training
    result = model.eval()(input_ids=IDS).logits.float()
    model.train(was_training)
    return result


def prepare(name, start, kind, make_config, tmp_path, **changes):
    head, task = (LlamaForSequenceClassification, "SEQ_CLS") if name == "reward" else (LlamaForCausalLM, "CAUSAL_LM")
    config = make_config(kind, task)
    base = tiny_base(head)
    if start == "peft_config":
        return make_trainer(name, tmp_path, model=base, peft_config=config, **changes)
    return make_trainer(name, tmp_path, model=trained(base, config), **changes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("start", ["peft_config", "trained"])
@pytest.mark.parametrize("name", SETUPS)
def test_trains_coefficients_and_nothing_else(name, start, kind, make_config, tmp_path):
    trainer = prepare(name, start, kind, make_config, tmp_path)
    model = trainer.model
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    before |= {key: value.clone() for key, value in model.named_buffers()}
    trainable = {key for key, value in model.named_parameters() if value.requires_grad}
    if start == "trained" and "ref" in model.peft_config:
        with torch.no_grad():
            own = logits(model)
            model.set_adapter("ref")
            assert torch.equal(logits(model), own), "TRL's reference is not a copy of the adapter"
            model.set_adapter("default")
        for key, value in model.named_parameters():  # set_adapter made "ref" untrainable again or not
            value.requires_grad_(key in trainable)
    trainer.train()
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert trainable
    assert moved == trainable
    assert all(".default." in key for key in trainable)
    if name in AT_THE_REFERENCE:
        key, expected = AT_THE_REFERENCE[name]
        assert first(trainer, key) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_resuming_gives_the_same_trajectory(name, kind, make_config, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    straight = prepare(name, "peft_config", kind, make_config, tmp_path / "straight", **saving)
    straight.train()
    resumed = prepare(name, "peft_config", kind, make_config, tmp_path / "resumed", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for (key, expected), (_, value) in zip(
        straight.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(value, expected, atol=1e-7, rtol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_reloaded_and_merged_models_give_the_same_logits(kind, make_config, tmp_path, base_dir):
    base = LlamaForCausalLM.from_pretrained(base_dir)
    trainer = make_trainer("sft", tmp_path / "run", model=base, peft_config=make_config(kind))
    trainer.train()
    expected = logits(trainer.model)
    assert (expected - logits(tiny_base())).abs().max() > 1e-3
    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(tiny_base(), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    torch.testing.assert_close(logits(reloaded.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_that_vllm_would_get_are_the_merged_base_and_unmerging_restores_it(kind, make_config):
    """The loop of TRL's vLLM weight sync (merge, take names without PEFT's prefix, unmerge), without vLLM."""
    base = tiny_base()
    names = dict(base.named_parameters()).keys()
    original = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = trained(base, make_config(kind))
    expected = logits(model)
    model.merge_adapter()
    seen = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.data.clone()
        for name, tensor in model.named_parameters()
        if model.prefix not in name
    }
    model.unmerge_adapter()
    assert seen.keys() == names
    server = tiny_base(seed=7)
    server.load_state_dict(seen, strict=False)
    torch.testing.assert_close(logits(server), expected, atol=1e-4, rtol=1e-4)
    for name, tensor in model.unload().state_dict().items():
        torch.testing.assert_close(tensor, original[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_coefficients_are_float32_on_a_bfloat16_base(name, kind, make_config, tmp_path):
    base = tiny_base(dtype=torch.bfloat16)
    trainer = make_trainer(name, tmp_path, model=base, peft_config=make_config(kind), bf16=True, max_steps=1)
    trainer.train()
    dtypes = {value.dtype for value in trainer.model.parameters() if value.requires_grad}
    assert dtypes == {torch.float32}
    assert trainer.model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_tokenizer_takes_any_text():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer("Grüße, 2+3!").input_ids) == "Grüße, 2+3!"
