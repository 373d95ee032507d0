"""Gated composition: the update of every token, its gradient, files and training, and what is refused by name."""

import copy

import pytest
import torch
from peft import ArrowConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file, save_file

from eigenpeft import AdapterCollection, AdapterStore, SubspaceBuilder, export_lora
from eigenpeft.errors import AdapterConfigError, EigenPeftError
from eigenpeft.linalg.gated import load_balance
from eigenpeft.tuners.gated import GatedLoraConfig
from tests.tuners.conftest import logits, random_subspace, tiny_gpt2, tiny_llama, train, trained_by_trainer

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    for seed, name in enumerate(("one", "two", "three")):
        base = tiny_llama()
        torch.manual_seed(seed)
        plain = LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(base, plain).save_pretrained(folder / "adapters" / name)
    adapters = AdapterCollection.from_pretrained(folder / "adapters")
    AdapterStore.from_collection(SubspaceBuilder(9).fit(adapters).subspace_, adapters).save_pretrained(folder / "store")
    return folder / "store"


def config(store, **settings):
    return GatedLoraConfig(**{"sources": str(store), "task_type": "CAUSAL_LM"} | settings)


def gated(store, base=None, **settings):
    torch.manual_seed(3)
    return get_peft_model(tiny_llama() if base is None else base, config(store, **settings)).eval()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def with_oracles(model):
    """A base whose linear layers have the update written out token by token, and the trained tensors that it uses."""
    base, leaves = tiny_llama().double(), {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            inside, outside = layer.lora_A["default"], layer.lora_B["default"]
            own = {part: getattr(outside, part).detach().clone().requires_grad_() for part in ("gate", "cores")}
            leaves |= {(name, part): tensor for part, tensor in own.items()}
            V_in, V_out = inside.components.double(), outside.components.double()

            def hook(module, inputs, output, own=own, V_in=V_in, V_out=V_out):
                rows = []
                for x in inputs[0].flatten(0, -2):
                    scores = torch.stack([row @ (V_in @ x) for row in own["gate"]]).exp()
                    core = sum(g * M for g, M in zip(scores / scores.sum(), own["cores"], strict=True))
                    rows.append(V_out.mT @ (core @ (V_in @ x)))
                return output + torch.stack(rows).view(output.shape)

            base.get_submodule(name).register_forward_hook(hook)
    return base, leaves


def test_update_and_gradients_are_those_of_sums_written_out_token_by_token(store, tokens):
    model = gated(store, base=tiny_llama().double()).double()
    with torch.no_grad():
        for name, parameter in trained(model).items():
            if name.endswith("gate"):
                parameter.mul_(50)
    base, leaves = with_oracles(model)
    torch.testing.assert_close(logits(model, tokens), logits(base, tokens), rtol=1e-8, atol=1e-9)
    model(input_ids=tokens, labels=tokens).loss.backward()
    base(input_ids=tokens, labels=tokens).loss.backward()
    for (name, part), leaf in leaves.items():
        found = model.get_base_model().get_submodule(name).lora_B["default"].get_parameter(part).grad
        torch.testing.assert_close(found, leaf.grad, rtol=1e-6, atol=1e-10)


def test_equal_weights_are_the_mean_of_the_members(store, tokens):
    model = gated(store)
    opened = AdapterStore.from_pretrained(store)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            if name.endswith("gate"):
                parameter.zero_()
    base = tiny_llama()
    for name in opened.subspace:
        pairs = [opened.factors(member, module=name) for member in opened.names]
        base.get_submodule(name).weight.data += sum(left @ right for left, right in pairs) / 3
    torch.testing.assert_close(logits(model, tokens), logits(base, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_cores", [True, False])
def test_trains_saves_loads_copies_and_serves_mixed_batches(store, tokens, tmp_path, train_cores):
    model, start = gated(store, train_cores=train_cores), logits(gated(store), tokens)
    parts = {name.rpartition(".")[2] for name in trained(model)}
    assert parts == ({"gate", "cores"} if train_cores else {"gate"})
    expected = train(model, tokens)
    assert (expected - start).abs().max() > 1e-5
    model.save_pretrained(tmp_path / "adapter")
    assert "No plain LoRA adapter does the same" in (tmp_path / "adapter" / "README.md").read_text()
    for low in (False, True):
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", low_cpu_mem_usage=low, is_trainable=True)
        assert torch.equal(logits(again.eval(), tokens), expected)
        assert trained(again).keys() == trained(model).keys()
    assert torch.equal(logits(copy.deepcopy(model), tokens), expected)
    again.add_adapter("other", config(store))
    again.set_adapter("other")
    other = logits(again.eval(), tokens)
    mixed = again(input_ids=tokens, adapter_names=["default", "other", "__base__"]).logits
    for row, whole in enumerate((expected, other, logits(tiny_llama(), tokens))):
        torch.testing.assert_close(mixed[row], whole[row], rtol=1e-5, atol=1e-5)
    again.set_adapter("default")
    again.delete_adapter("other")
    assert torch.equal(logits(again, tokens), expected)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_cores_from_zero_start_at_the_base_model(make, tokens):
    suffixes = TARGETS if make is tiny_llama else ["c_attn"]
    subspace = random_subspace(make(), suffixes)
    settings = GatedLoraConfig(subspace=subspace, n_cores=2, task_type="CAUSAL_LM", fan_in_fan_out=make is tiny_gpt2)
    model = get_peft_model(make(), settings)
    assert torch.equal(logits(model.eval(), tokens), logits(make(), tokens))
    assert (train(model, tokens) - logits(make(), tokens)).abs().max() > 1e-3


def test_the_trainer_resumes(store, tokens, tmp_path):
    def make():
        return gated(store, balance=0.1)

    trained_by_trainer(make, tokens, tmp_path / "run", steps=2)
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    resumed = trained_by_trainer(make, tokens, tmp_path / "run", steps=4, resume_from_checkpoint=checkpoint)
    whole = trained_by_trainer(make, tokens, tmp_path / "run", steps=4)
    torch.testing.assert_close(logits(resumed, tokens), logits(whole, tokens), rtol=1e-5, atol=1e-5)


def test_balance_adds_the_gradient_of_its_loss_in_training_alone(store, tokens):
    found, seen = gated(store, balance=0.3), []
    plain = gated(store)
    for layer in plain.modules():
        if isinstance(layer, LoraLayer):
            own = layer.lora_B["default"]
            own.register_forward_hook(lambda m, z, y: seen.append(torch.softmax(z[0] @ m.gate.mT, dim=-1)))
    assert torch.equal(logits(found, tokens), logits(plain, tokens))
    seen.clear()
    (plain.train()(input_ids=tokens, labels=tokens).loss + 0.3 * sum(map(load_balance, seen))).backward()
    found.train()(input_ids=tokens, labels=tokens).loss.backward()
    for name, parameter in trained(found).items():
        torch.testing.assert_close(parameter.grad, trained(plain)[name].grad, rtol=1e-4, atol=1e-7)


def test_frozen_parts_keep_their_precision_on_a_base_of_16_bits(store, tokens, tmp_path):
    model = gated(store, base=tiny_llama().to(torch.bfloat16), train_cores=False)
    assert {buffer.dtype for name, buffer in model.named_buffers() if ".lora_" in name} == {torch.float32}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama().to(torch.bfloat16), tmp_path).eval()
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_merging_combining_converting_exporting_and_storing_are_refused_by_name(store, tokens, tmp_path):
    model = gated(store)
    expected = train(model, tokens)
    for refused in (
        model.merge_adapter,
        lambda: copy.deepcopy(model).merge_and_unload(),
        lambda: export_lora(model, tmp_path / "plain"),
        lambda: convert_to_lora(model, rank=4),
        lambda: model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear"),
    ):
        with pytest.raises(AdapterConfigError, match="GATEDLORA"):
            refused()
        assert torch.equal(logits(model, tokens), expected)
    assert not (tmp_path / "plain").exists()
    assert list(model.peft_config) == ["default"]
    with pytest.raises(EigenPeftError, match="GATEDLORA"):
        AdapterStore.from_pretrained(store).add(model, name="mine")


def test_files_that_lack_a_tensor_or_have_another_are_refused(store, tmp_path):
    gated(store).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for ending in ("lora_A.components", "lora_B.components", "lora_B.gate", "lora_B.cores"):
        key = next(name for name in tensors if name.endswith(ending))
        save_file({name: value for name, value in tensors.items() if name != key}, path)
        with pytest.raises(AdapterConfigError, match=rf"has nothing for .*{ending}"):
            PeftModel.from_pretrained(tiny_llama(), tmp_path)
        save_file(tensors | {key: tensors[key][:1].clone()}, path)
        with pytest.raises(AdapterConfigError, match=rf"of shape .* for .*{ending}"):
            PeftModel.from_pretrained(tiny_llama(), tmp_path)
    save_file(tensors, path)
    saved = GatedLoraConfig.from_pretrained(tmp_path)
    saved.core_sizes = dict.fromkeys(saved.core_sizes, [3, 10**9, 9])
    with pytest.raises(AdapterConfigError, match="must be 3 cores of at most"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, config=saved)


def test_refusals(store):
    for settings, message in (
        ({"sources": None}, r"pass a store as sources="),
        ({"sources": None, "subspace": "x", "train_cores": False}, r"pass a store as sources="),
        ({"subspace": "x"}, r"pass a store as sources="),
        ({"n_cores": 0}, r"n_cores=0 must be a whole number"),
        ({"balance": -1.0}, r"balance=-1.0 must be a finite number"),
        ({"use_dora": True}, r"use_dora=True is not supported"),
        ({"gate": "router"}, r"gate='router' must be 'trained' or 'arrow'"),
        ({"top_k": 0}, r"top_k=0 must be a whole number of at least 1"),
        ({"gate": "arrow"}, r"nothing is trained. Pass train_cores=False"),
        ({"gate": "arrow", "train_cores": False, "balance": 0.1}, r"balance=0.1: the weights follow from the cores"),
    ):
        with pytest.raises(AdapterConfigError, match=message):
            config(store, **settings)
    with pytest.raises(AdapterConfigError, match=r"source_names=\['nobody'\]: the store has 'one'"):
        gated(store, source_names=["nobody"])
    with pytest.raises(
        AdapterConfigError, match=r"'model.layers.0.mlp.up_proj' is targeted, and the subspace has no bases"
    ):
        gated(store, target_modules=["up_proj"])
    with pytest.raises(AdapterConfigError, match="is for linear layers"):
        gated(store, target_modules=["embed_tokens"])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_arrow_has_the_logits_of_pefts_own(store, tokens, tmp_path, monkeypatch, top_k):
    # PEFT finds the leading direction by 15 steps of power iteration, which is not enough for random adapters.
    monkeypatch.setattr(ArrowLoraLinearLayer.top_right_singular_vec_from_BA, "__defaults__", (2000, 1e-8))
    members = [str(store.parent / "adapters" / name) for name in ("one", "two", "three")]
    theirs = create_arrow_model(tiny_llama(), members, ArrowConfig(top_k=top_k)).eval()
    model = gated(store, gate="arrow", top_k=top_k, train_cores=False)
    expected = logits(theirs, tokens)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-5)
    assert not trained(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    with pytest.raises(AdapterConfigError, match="GATEDLORA"):
        again.merge_and_unload()
