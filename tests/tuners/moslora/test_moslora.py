"""MoSLoRA as a PEFT method: the formula, identity is LoRA step for step, folding is exact."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from eigenpeft import MosLoraConfig
from eigenpeft.errors import AdapterConfigError
from tests.tuners.conftest import is_conv1d, logits, train


def adapted(architecture, **settings):
    make, suffixes = architecture
    model = make()
    torch.manual_seed(7)
    settings |= {"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", "fan_in_fan_out": is_conv1d(architecture)}
    return get_peft_model(model, MosLoraConfig(target_modules=list(suffixes), **settings))


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", "identity"])
def test_starts_at_the_base_model_trains_saves_and_merges(architecture, tmp_path, tokens, init):
    base = logits(architecture[0](), tokens)
    model = adapted(architecture, init_mixer=init)
    torch.testing.assert_close(logits(model, tokens), base, atol=1e-6, rtol=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = train(model, tokens)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in moved} == {"weight", "factor", "mixer"}
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        logits(PeftModel.from_pretrained(architecture[0](), tmp_path / "adapter").eval(), tokens), expected
    )
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), expected, atol=1e-6, rtol=1e-5)


def test_update_is_the_formula(architecture, tokens):
    model = adapted(architecture)
    train(model, tokens)
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        A, B, M = layer.lora_A["default"].weight, layer.lora_B["default"].factor, layer.lora_B["default"].mixer
        expected = 10 / 4 * B.double() @ M.double() @ A.double()
        update = layer.get_delta_weight("default").double()
        torch.testing.assert_close(update.T if layer.fan_in_fan_out else update, expected, atol=1e-6, rtol=1e-5)


def test_identity_mixer_held_fixed_is_lora_step_for_step(architecture, tokens):
    make, suffixes = architecture
    base = make()
    torch.manual_seed(7)
    settings = {"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", "fan_in_fan_out": is_conv1d(architecture)}
    lora = get_peft_model(base, LoraConfig(target_modules=list(suffixes), **settings))
    mixed = adapted(architecture, init_mixer="identity", train_mixer=False)
    for _ in range(20):
        torch.testing.assert_close(train(mixed, tokens, steps=1), train(lora, tokens, steps=1), atol=1e-6, rtol=0)


# PEFT warns of "eva" without a configuration.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_mixer": "zeros"}, "init_mixer='zeros' must be one of 'kaiming', 'orthogonal', 'identity'"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva' must be one of"),
        ({"megatron_config": {"a": 1}, "megatron_core": "x"}, "megatron_config"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(AdapterConfigError, match=message):
        MosLoraConfig(target_modules=["q_proj"], **settings)
