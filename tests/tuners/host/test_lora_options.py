"""LoRA's own options that our layers take: biases of the update and activated LoRA."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import ArrowConfig, MontecloraConfig, VeloraConfig
from torch import nn

from eigenpeft import EigenLoraConfig, MosLoraConfig, export_lora
from eigenpeft.errors import AdapterConfigError
from tests.tuners.conftest import logits, random_subspace, tiny_llama, train

LAYERS = ["q_proj", "v_proj"]


def base():
    return tiny_llama(attention_bias=True, num_hidden_layers=1)


def config(kind, **options):
    options = {"r": 4, "task_type": "CAUSAL_LM", **options}
    if kind == "moslora":
        return MosLoraConfig(target_modules=LAYERS, **options)
    return EigenLoraConfig(subspace=random_subspace(base(), LAYERS), core=kind, **options)


KINDS = ["moslora", "low_rank", "mixer", "diagonal"]


@pytest.mark.parametrize("kind", KINDS)
def test_biases_learn_save_merge_and_unmerge_exactly(tmp_path, tokens, kind):
    model = get_peft_model(base(), config(kind, lora_bias=True))
    torch.testing.assert_close(logits(model, tokens), logits(base(), tokens))
    expected = train(model, tokens, steps=2)
    biases = {name: value for name, value in model.named_parameters() if ".lora_B." in name and name.endswith("bias")}
    assert len(biases) == 2
    assert all(bias.abs().max() > 0 for bias in biases.values())
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(logits(back, tokens), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_biases_are_lora_s_in_a_mixed_batch(tokens, kind):
    model = get_peft_model(base(), config(kind, lora_bias=True))
    train(model, tokens, steps=2)
    model.add_adapter("other", config(kind, lora_bias=True))
    alone = logits(model, tokens)
    with torch.no_grad():
        mixed = model(input_ids=tokens, adapter_names=["default", "__base__", "other"]).logits
    torch.testing.assert_close(mixed[0], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1:], logits(base(), tokens)[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("combination", ["linear", "svd"])
def test_combined_adapters_sum_their_biases(tokens, kind, combination):
    model = get_peft_model(base(), config(kind, lora_bias=True, lora_alpha=2))
    model.add_adapter("other", config(kind, lora_bias=True, lora_alpha=8))
    for name in ("default", "other"):
        model.set_adapter(name)
        train(model, tokens, steps=1)
    model.base_model.add_weighted_adapter(["default", "other"], [2.0, -0.5], "both", combination)
    for layer in model.modules():
        if hasattr(layer, "lora_bias"):
            biases = {name: layer.scaling[name] * layer.lora_B[name].bias for name in layer.lora_B}
            torch.testing.assert_close(biases["both"], 2 * biases["default"] - 0.5 * biases["other"])


@pytest.mark.parametrize(
    "options", [({"lora_bias": True}, {}), ({"alora_invocation_tokens": [3]}, {"alora_invocation_tokens": [4]})]
)
def test_adapters_whose_options_differ_are_not_combined(options):
    model = get_peft_model(base(), config("low_rank", **options[0]))
    model.add_adapter("other", config("low_rank", **options[1]))
    with pytest.raises(AdapterConfigError, match=r"their \w+ differ \('default' has .*, 'other' has"):
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "linear")


class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


def test_convolutions_have_biases_too():
    subspace = random_subspace(nn.ModuleDict({"conv": nn.Linear(4 * 9, 6)}), ["conv"], n_components=5)
    x = torch.randn(2, 4, 5, 5)
    for setting in (
        EigenLoraConfig(subspace=subspace, r=2, lora_bias=True),
        MosLoraConfig(r=2, target_modules=["conv"], lora_bias=True),
    ):
        model = get_peft_model(Picture(), setting)
        layer = model.base_model.model.conv
        with torch.no_grad():
            layer.lora_B["default"].bias.fill_(3.0)
        expected = Picture()(x) + 3 * layer.scaling["default"]
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model.merge_and_unload()(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_activated_lora_acts_from_its_invocation_on(tmp_path, tokens, kind):
    tokens[:, 4:6] = torch.tensor([7, 8])
    model = get_peft_model(base(), config(kind, alora_invocation_tokens=[7, 8]))
    expected = train(model, tokens, steps=2)
    plain = logits(base(), tokens)
    torch.testing.assert_close(expected[:, :4], plain[:, :4])
    assert (expected[:, 4:] - plain[:, 4:]).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(logits(back, tokens), expected)
    with pytest.raises(NotImplementedError, match="aLoRA"):
        back.merge_adapter()


def test_activated_lora_matches_lora_with_the_same_factors(tokens):
    """MoSLoRA with an identity mixer that is not trained is plain LoRA, token by token."""
    tokens[:, 4:6] = torch.tensor([7, 8])
    options = {"r": 4, "target_modules": LAYERS, "alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    theirs = get_peft_model(base(), LoraConfig(**options))
    torch.manual_seed(1)
    ours = get_peft_model(base(), MosLoraConfig(init_mixer="identity", train_mixer=False, **options))
    torch.testing.assert_close(train(ours, tokens), train(theirs, tokens), atol=1e-5, rtol=1e-5)


def test_a_combination_wider_than_the_weight_is_whole(tokens):
    """PEFT's "svd" cuts A at in_features and B at out_features; v_proj has 16 x 32 here."""
    options = {"target_modules": LAYERS, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base(), MosLoraConfig(r=8, **options))
    model.add_adapter("wide", MosLoraConfig(r=20, **options))
    model.base_model.add_weighted_adapter(["default", "wide"], [1.0, 1.0], "both", "svd")
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            assert (len(layer.lora_A["both"].weight), layer.lora_B["both"].weight.shape[1]) == (20, 20)
            if layer.out_features < 20:  # q_proj has 32 x 32, whose sum of rank 28 is truncated
                update = layer.get_delta_weight("default") + layer.get_delta_weight("wide")
                torch.testing.assert_close(layer.get_delta_weight("both"), update, atol=1e-4, rtol=1e-4)
    model.set_adapter("both")
    assert logits(model, tokens).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["velora_config", "monteclora_config"])
def test_variants_of_the_training_come_back_and_merge(tmp_path, tokens, kind, option):
    value = {"velora_config": VeloraConfig(num_groups=4), "monteclora_config": MontecloraConfig(num_samples=2)}
    model = get_peft_model(base(), config(kind, **{option: value[option]}))
    expected = train(model, tokens, steps=2, lr=0.05)
    assert (expected - logits(base(), tokens)).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path / "ours").eval(), tokens), expected)
    export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(base(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), expected, atol=1e-5, rtol=1e-5)


# PEFT warns of "eva" without a configuration.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", [MosLoraConfig, EigenLoraConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arrow_config": ArrowConfig()}, "arrow_config=.* is not supported"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva' must be one of True, False, 'gaussian'"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
    ],
)
def test_what_the_methods_do_not_define_is_refused(method, options, message):
    with pytest.raises(AdapterConfigError, match=message):
        method(**options)


@pytest.mark.parametrize("options", [{"init_lora_weights": "mica"}, {"layer_replication": [(0, 1)]}])
def test_what_lies_in_no_subspace_is_refused_by_eigenlora_alone(options):
    (name,) = options
    MosLoraConfig(**options)
    with pytest.raises(AdapterConfigError, match=name):
        EigenLoraConfig(**options)


def test_repeated_layers_are_adapted_one_by_one(tmp_path, tokens):
    settings = {"r": 4, "target_modules": LAYERS, "task_type": "CAUSAL_LM", "layer_replication": [[0, 1], [0, 1]]}
    model = get_peft_model(base(), MosLoraConfig(**settings))
    expected = train(model, tokens)
    assert sum(name.endswith("lora_B") for name, _ in model.named_modules()) == 4
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path).eval(), tokens), expected)
