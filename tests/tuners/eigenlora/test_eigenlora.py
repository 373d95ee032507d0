"""EigenLoRA as a PEFT method, on Linear (Llama) and Conv1D (GPT-2)."""

import copy
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from eigenpeft import EigenLoraConfig, PrincipalSubspace
from eigenpeft.errors import AdapterConfigError, ArtifactError, SubspaceError, SubspaceNotFoundError
from eigenpeft.tuners import control_config
from eigenpeft.tuners.layers.linear import InputFactor, OutputFactor
from tests.tuners.conftest import logits, needs_own_adapters, random_subspace, tiny_bert, tiny_llama, train

CORES = ("low_rank", "full", "diagonal")


def adapted(architecture, tmp_path, *, name="subspace", **settings):
    make, suffixes = architecture
    model = make()
    subspace = random_subspace(model, suffixes)
    subspace.save_pretrained(tmp_path / name)
    return get_peft_model(model, EigenLoraConfig(subspace=subspace, r=4, task_type="CAUSAL_LM", **settings))


def factors(model, adapter="default"):
    return {
        name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer) and adapter in layer.lora_A
    }


@pytest.mark.parametrize("core", CORES)
def test_starts_at_the_base_model_and_trains_coefficients_alone(architecture, tmp_path, tokens, core):
    base = logits(architecture[0](), tokens)
    model = adapted(architecture, tmp_path, core=core)
    torch.testing.assert_close(logits(model, tokens), base, atol=1e-6, rtol=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bases_before = {
        name: layer.lora_A["default"].frozen_bank.components_in.clone() for name, layer in factors(model).items()
    }
    assert (train(model, tokens) - base).abs().max() > 1e-3
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == trainable
    assert all(name.endswith("default.coefficients") for name in trainable)
    for name, layer in factors(model).items():
        assert torch.equal(layer.lora_A["default"].frozen_bank.components_in, bases_before[name])


@pytest.mark.parametrize(("core", "parameters"), [("low_rank", 2 * 12 * 4), ("full", 12 * 12), ("diagonal", 12)])
def test_number_of_parameters_a_module(architecture, tmp_path, core, parameters):
    model = adapted(architecture, tmp_path, core=core)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == parameters * len(factors(model))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 13}, True),
        ({"r": 12}, False),
        ({"r": 12, "n_components": 4}, True),
        ({"r": 13, "core": "full"}, False),
        ({"r": 13, "core": "diagonal"}, False),
    ],
)
def test_a_rank_above_the_components_is_said(tmp_path, caplog, settings, said):
    subspace = random_subspace(tiny_llama(), ("q_proj", "v_proj"))
    get_peft_model(tiny_llama(), EigenLoraConfig(subspace=subspace, **settings))
    assert ("and a core on them has rank" in caplog.text) == said


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("rslora", "scaling"), [(False, 10 / 4), (True, 10 / 2)])
def test_update_is_the_formula(architecture, tmp_path, tokens, core, rslora, scaling):
    model = adapted(architecture, tmp_path, core=core, lora_alpha=10, use_rslora=rslora)
    train(model, tokens)
    for layer in factors(model).values():
        frozen_bank = layer.lora_A["default"].frozen_bank
        C_in, C_out = (getattr(layer, side)["default"].coefficients for side in ("lora_A", "lora_B"))
        P = {"low_rank": lambda: C_out @ C_in, "full": lambda: C_out, "diagonal": lambda: torch.diag(C_out)}[core]()  # noqa: B023
        expected = scaling * frozen_bank.components_out.double().T @ P.double() @ frozen_bank.components_in.double()
        update = layer.get_delta_weight("default").double()
        update = update.T if getattr(layer, "fan_in_fan_out", False) else update
        torch.testing.assert_close(update, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("save_subspace", ["reference", "embed"])
def test_save_and_load_give_identical_logits(architecture, tmp_path, tokens, core, save_subspace):
    model = adapted(architecture, tmp_path, core=core, save_subspace=save_subspace)
    expected = train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(architecture[0](), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, tokens), expected)
    low_memory = PeftModel.from_pretrained(architecture[0](), tmp_path / "adapter", low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(low_memory, tokens), expected)


LOAD_ELSEWHERE = """
import sys, torch, eigenpeft
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokens, expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    # Another process may sum in another order (threads), so the last bits may differ.
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-6)
"""


@pytest.mark.parametrize("save_subspace", ["reference", "embed"])
def test_loads_in_another_process(tmp_path, tokens, save_subspace):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    subspace = random_subspace(base, ["q_proj"])
    if save_subspace == "reference":
        subspace.save_pretrained(tmp_path / "subspace")
    model = get_peft_model(
        base, EigenLoraConfig(subspace=subspace, r=4, task_type="CAUSAL_LM", save_subspace=save_subspace)
    )
    expected = train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    torch.save((tokens, expected), tmp_path / "expected.pt")
    subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, tmp_path / "adapter", tmp_path / "expected.pt"], check=True, timeout=900
    )


def test_adapter_file_holds_coefficients_only_and_names_the_subspace(architecture, tmp_path):
    model = adapted(architecture, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["subspace"] == str(tmp_path / "subspace")
    assert len(config["subspace_sha256"]) == 64
    assert config["requires_package"] == "eigenpeft"
    assert config["peft_type"] == "EIGENLORA"
    floats = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 4 * floats <= size < 4 * floats + 400 * len(factors(model))
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "adapter"), EigenLoraConfig)


def test_unsaved_subspace_is_embedded(architecture, tmp_path):
    make, suffixes = architecture
    model = get_peft_model(make(), EigenLoraConfig(subspace=random_subspace(make(), suffixes), r=4))
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["subspace"] is None
    assert set(config["embedded_n_components"].values()) == {12}


def test_a_lost_subspace_is_one_error_that_says_where_it_looked(tmp_path, tokens, monkeypatch):
    model = adapted((tiny_llama, ("q_proj",)), tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "subspace").rename(tmp_path / "elsewhere")
    monkeypatch.setattr("eigenpeft.tuners.layers.shared_bases._live", {})
    with pytest.raises(
        SubspaceNotFoundError, match="Searched: subspaces in memory; .*subspace.*EIGENPEFT_SUBSPACE_PATH"
    ):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    monkeypatch.setenv("EIGENPEFT_SUBSPACE_PATH", str(tmp_path / "elsewhere"))
    with pytest.raises(SubspaceNotFoundError):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    (tmp_path / "library").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "library" / "subspace")
    monkeypatch.setenv("EIGENPEFT_SUBSPACE_PATH", str(tmp_path / "library"))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_a_relative_subspace_is_found_beside_the_adapter(tmp_path, tokens, monkeypatch):
    subspace = random_subspace(tiny_llama(), ["q_proj"], seed=0)
    subspace.save_pretrained(tmp_path / "subspace")
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(tiny_llama(), EigenLoraConfig(subspace="subspace")).eval()
    model.save_pretrained(tmp_path / "out" / "adapter")
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    monkeypatch.setattr("eigenpeft.tuners.layers.shared_bases._live", {})
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out" / "adapter").eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    random_subspace(tiny_llama(), ["q_proj"], seed=1).save_pretrained(tmp_path / "subspace", overwrite=True)
    monkeypatch.setattr("eigenpeft.tuners.layers.shared_bases._live", {})
    with pytest.raises(ArtifactError, match="it is another subspace"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "out" / "adapter")


def test_another_subspace_at_the_same_place_is_refused(tmp_path, monkeypatch):
    model = adapted((tiny_llama, ("q_proj",)), tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    random_subspace(tiny_llama(), ["q_proj"], seed=1).save_pretrained(tmp_path / "subspace", overwrite=True)
    monkeypatch.setattr("eigenpeft.tuners.layers.shared_bases._live", {})
    with pytest.raises(ArtifactError, match="it is another subspace"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")


def test_adapters_share_one_copy_of_each_basis(architecture, tmp_path, tokens):
    model = adapted(architecture, tmp_path)
    config = model.peft_config["default"]
    for index in range(9):
        model.add_adapter(f"task{index}", EigenLoraConfig(subspace=config.subspace, r=2 + index % 3, core="low_rank"))

    def storages(model):
        return [
            {layer.lora_A[name].frozen_bank.components_in.untyped_storage().data_ptr() for name in layer.lora_A}
            | {id(layer.lora_B[name].frozen_bank) for name in layer.lora_B}
            for layer in factors(model).values()
        ]

    for variant in (
        model,
        model.double(),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        model.to(torch.bfloat16),
    ):
        assert len(factors(variant)) >= 2
        assert all(len(pointers) == 2 for pointers in storages(variant))  # one storage, one module
        assert all(len(layer.lora_bases) == 1 for layer in factors(variant).values())


def test_several_adapters_switch_disable_and_delete(architecture, tmp_path, tokens):
    base = logits(architecture[0](), tokens)
    model = adapted(architecture, tmp_path)
    first = train(model, tokens)
    model.add_adapter("second", EigenLoraConfig(subspace=str(tmp_path / "subspace"), r=3, core="full"))
    model.set_adapter("second")
    second = train(model, tokens)
    assert (first - second).abs().max() > 1e-4
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens), first)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), base)
    mixed = model(input_ids=tokens, adapter_names=["default", "second", "__base__"]).logits
    for row, expected in enumerate((first, second, base)):
        torch.testing.assert_close(mixed[row], expected[row], atol=1e-5, rtol=1e-5)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model, tokens), second)
    model.delete_adapter("second")
    assert all(not module.lora_bases for module in model.modules() if isinstance(module, LoraLayer))


@pytest.mark.parametrize("core", CORES)
def test_merging(architecture, tmp_path, tokens, core):
    model = adapted(architecture, tmp_path, core=core)
    expected = train(model, tokens)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, InputFactor | OutputFactor | LoraLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged, tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_train_float32_coefficients(architecture, tmp_path, tokens, dtype):
    make, suffixes = architecture
    subspace = random_subspace(make(), suffixes)
    model = get_peft_model(make().to(dtype), EigenLoraConfig(subspace=subspace, r=4))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    base = logits(make().to(dtype), tokens)
    assert torch.equal(logits(model, tokens), base)
    trained = train(model, tokens)
    assert trained.dtype == dtype
    assert (trained - base).abs().max() > 1e-3


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, tokens):
    gradients = []
    for checkpointing in (False, True):
        model = adapted((tiny_llama, ("q_proj", "v_proj")), tmp_path, name=f"s{checkpointing}", lora_dropout=0.0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.slow
@pytest.mark.parametrize("core", CORES)
def test_torch_compile(tmp_path, tokens, core, no_shape_checks):
    model = adapted((tiny_llama, ("q_proj", "v_proj")), tmp_path, core=core)
    expected = train(model, tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, tokens), expected, atol=1e-5, rtol=1e-5)


@needs_own_adapters
def test_transformers_own_adapter_methods(tmp_path, tokens):
    model = tiny_llama()
    random_subspace(model, ["q_proj"]).save_pretrained(tmp_path / "subspace")
    model.add_adapter(EigenLoraConfig(subspace=str(tmp_path / "subspace"), r=4, target_modules=["q_proj"]))
    expected = train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    fresh = tiny_llama()
    fresh.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(fresh.eval(), tokens), expected)


def test_auto_model(tmp_path, tokens):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    random_subspace(base, ["q_proj"]).save_pretrained(tmp_path / "subspace")
    model = get_peft_model(base, EigenLoraConfig(subspace=str(tmp_path / "subspace"), r=4, task_type="CAUSAL_LM"))
    expected = train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval(), tokens), expected)


def test_truncated_subspace(architecture, tmp_path, tokens):
    model = adapted(architecture, tmp_path, n_components=5)
    assert {len(layer.lora_A["default"].frozen_bank.components_in) for layer in factors(model).values()} == {5}
    expected = train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        logits(PeftModel.from_pretrained(architecture[0](), tmp_path / "adapter").eval(), tokens), expected
    )


def test_patterns_and_layers(tmp_path):
    model = adapted(
        (tiny_llama, ("q_proj", "v_proj")),
        tmp_path,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"q_proj": 32},
    )
    layers = factors(model)
    assert all(".layers.1." in name for name in layers)
    assert {
        name.rsplit(".", 1)[1]: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()
    } == {
        "q_proj": (4, 8.0),
        "v_proj": (2, 4.0),
    }


def test_head_is_trained_and_saved_and_prefixes_may_differ(tmp_path, tokens):
    bare = tiny_bert().bert  # the same base without the classifier: names lack the prefix "bert."
    subspace = random_subspace(bare, ["query", "value"])
    assert subspace.modules[0].startswith("encoder.")
    model = get_peft_model(tiny_bert(), EigenLoraConfig(subspace=subspace, r=4, task_type="SEQ_CLS"))
    assert len(factors(model)) == 4
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=tokens, labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    expected = logits(model.eval(), tokens)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter").eval(), tokens), expected)


def test_dropout_acts_in_training_only(tmp_path, tokens):
    model = adapted((tiny_llama, ("q_proj",)), tmp_path, lora_dropout=0.5)
    train(model, tokens)
    assert torch.equal(logits(model, tokens), logits(model, tokens))
    model.train()
    assert not torch.equal(logits(model, tokens), logits(model, tokens))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"core": "other"},
            AdapterConfigError,
            "core='other' must be one of 'low_rank', 'full', 'diagonal', 'mixture'",
        ),
        ({"save_subspace": "no"}, AdapterConfigError, "save_subspace='no' must be one of"),
        ({"n_components": 0}, AdapterConfigError, "n_components=0 must be None or a whole number"),
        ({"n_components": 40}, SubspaceError, "n_components=40 must be between 1 and the 12 components"),
        ({"r": 0}, AdapterConfigError, "r=0 must be a whole number of at least 1"),
        ({"init_lora_weights": "pissa"}, AdapterConfigError, "init_lora_weights='pissa' must be one of"),
        ({"layer_replication": [[0, 1]]}, AdapterConfigError, "layer_replication=.* is not supported"),
        ({"subspace_sha256": "f" * 64}, AdapterConfigError, "is not the fingerprint"),
        (
            {"target_modules": ["o_proj"]},
            AdapterConfigError,
            "'model.layers.0.self_attn.o_proj' is targeted but not in the subspace",
        ),
        ({"subspace": None}, AdapterConfigError, "EigenLoRA needs a subspace"),
        ({"subspace": "/nowhere/at/all"}, SubspaceNotFoundError, "'/nowhere/at/all' .* was not found"),
    ],
)
def test_refusals(settings, error, message):
    model = tiny_llama()
    subspace = random_subspace(model, ["q_proj"])
    with pytest.raises(error, match=message):
        get_peft_model(model, EigenLoraConfig(**{"subspace": subspace, "r": 4} | settings))


def test_another_base_model_is_refused():
    subspace = random_subspace(tiny_llama(hidden_size=64), ["q_proj"])
    with pytest.raises(AdapterConfigError, match="32 x 32 in the model and 64 x 64 in the subspace"):
        get_peft_model(tiny_llama(), EigenLoraConfig(subspace=subspace, r=4))
    with pytest.raises(AdapterConfigError, match="None of the subspace's 2 modules"):
        get_peft_model(tiny_bert(), EigenLoraConfig(subspace=subspace, r=4))


def test_the_old_name_of_the_full_core_warns_users_and_not_readers_of_files(tmp_path):
    with pytest.warns(DeprecationWarning, match="core='mixer' is deprecated .* use core='full'") as caught:
        config = EigenLoraConfig(subspace="subspace", core="mixer")
    assert caught[0].filename == __file__
    assert config.core == "full"
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {"core": "mixer"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EigenLoraConfig.from_pretrained(tmp_path).core == "full"
        assert PeftConfig.from_pretrained(tmp_path).core == "full"


def test_a_subspace_is_read_once_for_all_layers_and_the_config_keeps_what_its_user_wrote(tmp_path, monkeypatch):
    subspace = random_subspace(tiny_llama(), ["q_proj", "v_proj"])
    subspace.save_pretrained(tmp_path / "subspace")
    config = EigenLoraConfig(subspace=str(tmp_path / "subspace"), r=4, lora_alpha=4)
    before = config.to_dict()
    read, reads = PrincipalSubspace.from_pretrained, []
    monkeypatch.setattr(
        PrincipalSubspace, "from_pretrained", lambda *args, **kwargs: reads.append(args) or read(*args, **kwargs)
    )
    model = get_peft_model(tiny_llama(), config)
    assert len(reads) == 1 < len(factors(model))
    changed = {name for name, value in config.to_dict().items() if value != before[name]}
    assert changed - {"base_model_name_or_path"} == {"subspace_sha256", "target_modules"}
    assert config.subspace_sha256 == subspace.fingerprint
    assert not any(isinstance(value, PrincipalSubspace) for value in vars(config).values())


def test_asking_a_config_for_its_subspace_writes_nothing_into_it(tmp_path):
    random_subspace(tiny_llama(), ["q_proj"]).save_pretrained(tmp_path / "subspace")
    config = EigenLoraConfig(subspace=str(tmp_path / "subspace"))
    before = copy.deepcopy(vars(config))
    assert control_config(config, control="random").subspace_sha256 != config.subspace_sha256
    assert vars(config) == before
