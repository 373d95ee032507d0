"""MoSLoRA from the starts that write A and B themselves: `B M A` is their `B A`, and the base model's output is kept."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from eigenpeft import MosLoraConfig
from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.moslora.start import initial_mixer, unmixed
from tests.tuners.conftest import logits, tiny_llama, train

LAYERS = ["q_proj", "v_proj"]
STARTS = ["orthogonal", "pissa", "pissa_niter_4", "olora", "mica"]


def base():
    return tiny_llama(num_hidden_layers=1)


def adapted(start, mixer="kaiming", **options):
    torch.manual_seed(3)
    options = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options
    return get_peft_model(
        base(), MosLoraConfig(target_modules=LAYERS, init_lora_weights=start, init_mixer=mixer, **options)
    )


@pytest.mark.parametrize("mixer", ["kaiming", "orthogonal", "identity"])
def test_b_is_solved_for_the_mixer(mixer):
    torch.manual_seed(0)
    factor, start = torch.randn(9, 5), initial_mixer(5, init=mixer)
    expected = factor.double() @ torch.linalg.inv(start.double())
    torch.testing.assert_close(unmixed(factor, start).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(unmixed(factor, start).double() @ start.double(), factor.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mixer", ["kaiming", "identity"])
@pytest.mark.parametrize("start", STARTS)
def test_the_start_is_lora_s_and_it_trains_saves_and_merges(tmp_path, tokens, start, mixer):
    model = adapted(start, mixer)
    torch.testing.assert_close(logits(model, tokens), logits(base(), tokens), atol=1e-6, rtol=1e-5)
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        first = layer.lora_B["default"].mixer
        torch.testing.assert_close(first @ first.T, torch.eye(4), atol=1e-5, rtol=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = train(model, tokens)
    moved = {
        name.rsplit(".", 1)[1] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {"weight", "mixer"} | ({"factor"} if start != "mica" else set())  # MiCA trains no B
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(logits(back, tokens), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_update_is_that_of_plain_lora(start):
    torch.manual_seed(3)
    plain = get_peft_model(base(), LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, init_lora_weights=start))
    layers = [[each for each in model.modules() if isinstance(each, LoraLayer)] for model in (adapted(start), plain)]
    assert len(layers[0]) == 2
    for ours, theirs in zip(*layers, strict=True):
        assert theirs.get_delta_weight("default").abs().max() > 1e-2
        torch.testing.assert_close(
            ours.get_delta_weight("default"), theirs.get_delta_weight("default"), atol=1e-6, rtol=1e-4
        )
        torch.testing.assert_close(ours.get_base_layer().weight, theirs.get_base_layer().weight)


# PEFT warns of what the test is about.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_changed_the_base_is_converted_to_the_published_model(tmp_path, tokens, start):
    model = adapted(start)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it, so that loading does not start anew
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    expected = train(model, tokens)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    back = PeftModel.from_pretrained(base(), tmp_path / "converted").eval()
    assert back.peft_config["default"].r == 8
    torch.testing.assert_close(logits(back, tokens), expected, atol=1e-4, rtol=1e-4)
    with back.disable_adapter():
        assert torch.equal(logits(back, tokens), logits(base(), tokens))


# PEFT warns of what the test is about.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_starts_from_data_are_lora_s(tmp_path, tokens, start):
    configs = {"corda": {"corda_config": CordaConfig()}, "lora_ga": {"lora_ga_config": LoraGAConfig()}}
    models = []
    for method in (MosLoraConfig, LoraConfig):
        config = method(
            r=4, target_modules=LAYERS, init_lora_weights=start, task_type="CAUSAL_LM", **copy.deepcopy(configs[start])
        )
        model = base()
        if start == "corda":
            preprocess_corda(
                model, config, run_model=lambda model=model: model(input_ids=tokens[:1]), hooked_model=model
            )
        else:
            preprocess_loraga(model, config, lambda model=model: model(input_ids=tokens, labels=tokens).loss.backward())
        torch.manual_seed(0)
        models.append(get_peft_model(model, config))
    ours, theirs = models
    torch.testing.assert_close(logits(ours, tokens), logits(base(), tokens), atol=1e-5, rtol=1e-5)
    # Of the first layer: LoRA-GA's are random signs and directions, and our mixer draws in between.
    mine, lora = (next(each for each in model.modules() if isinstance(each, LoraLayer)) for model in models)
    update = lora.get_delta_weight("default")
    assert update.abs().max() > 0
    assert (mine.get_delta_weight("default") - update).norm() < 1e-4 * update.norm()
    ours.peft_config["default"].init_lora_weights = True
    ours.save_pretrained(tmp_path / "start")
    ours.peft_config["default"].init_lora_weights = start
    expected = train(ours, tokens)
    ours.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    back = PeftModel.from_pretrained(base(), tmp_path / "converted").eval()
    torch.testing.assert_close(logits(back, tokens), expected, atol=1e-4, rtol=1e-4)


def test_mica_on_an_embedding_trains_the_mixer_and_a_alone():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Embedding(20, 16)), MosLoraConfig(r=3, target_modules=["0"], init_lora_weights="mica")
    )
    trained = {name.split("0.", 1)[1] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"lora_embedding_A.default", "lora_embedding_B.default.mixer"}
    model.add_adapter("other", MosLoraConfig(r=3, target_modules=["0"]))
    model.set_adapter("other")
    model.set_adapter("default")
    assert {name.split("0.", 1)[1] for name, value in model.named_parameters() if value.requires_grad} == trained


def test_folded_the_start_is_plain_lora_s(tokens):
    torch.manual_seed(3)
    plain = get_peft_model(base(), LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, init_lora_weights="pissa"))
    folded = adapted("pissa", fold=True)
    ours, theirs = ({k: v for k, v in model.state_dict().items() if "lora_" in k} for model in (folded, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


# PEFT warns of what the test is about.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_start_that_layers_with_blocks_cannot_have_is_refused():
    with pytest.raises(AdapterConfigError, match="init_lora_weights='pissa' and use_bdlora exclude each other"):
        MosLoraConfig(init_lora_weights="pissa", use_bdlora={"target_modules_bd_a": ["q_proj"], "nblocks": 2})
    with pytest.raises(AdapterConfigError, match="init_lora_weights='eva' must be one of True, .*'pissa', 'olora'"):
        MosLoraConfig(init_lora_weights="eva")
