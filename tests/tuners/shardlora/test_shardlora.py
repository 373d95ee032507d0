"""LoRA with shared shards: sizes of the paper's formula, the update as written, files, several adapters, refusals."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file

from eigenpeft import AdapterCollection, AdapterStore, export_lora, merge
from eigenpeft.errors import AdapterConfigError, EigenPeftError
from eigenpeft.tuners import ShardLoraConfig
from eigenpeft.tuners.shardlora.sharing import SHARINGS, Budget, n_parameters
from tests.tuners.conftest import logits, random_subspace, tiny_bert, tiny_llama, train

TARGETS = ["q_proj", "v_proj", "down_proj"]
N_LAYERS = 4


def llama():
    return tiny_llama(num_hidden_layers=N_LAYERS)


def config(**settings):
    common = {"r": 4, "lora_alpha": 8, "pool_rank": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return ShardLoraConfig(**common | settings)


def adapted(base=None, **settings):
    torch.manual_seed(5)
    return get_peft_model(llama() if base is None else base, config(**settings))


def layers(model):
    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}


def n_trained(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def widths(suffix):
    found = next(layer for name, layer in layers(adapted()).items() if name.endswith(suffix))
    return found.in_features, found.out_features


@pytest.mark.parametrize(("rank", "private", "length"), [(4, 1, 2), (7, 1, 1), (4, 0, 8), (3, 3, 4)])
def test_shards_train_as_many_numbers_as_lora_of_the_pools_rank(rank, private, length):
    model = adapted(r=rank, pool_rank=3, private_rank=private, shards_per_vector=length)
    plain = get_peft_model(llama(), LoraConfig(r=3, target_modules=TARGETS))
    written = sum(3 * N_LAYERS * sum(widths(suffix)) for suffix in TARGETS)  # e L (n + m) per kind of layer
    assert n_trained(model) == n_trained(plain) == written


@pytest.mark.parametrize("sharing", SHARINGS)
def test_the_number_of_trained_values_is_that_of_the_formula(sharing):
    model, budget = adapted(sharing=sharing), Budget(N_LAYERS, 4, 3, 1)
    sizes = [dict(zip(("in_features", "out_features"), widths(suffix), strict=True)) for suffix in TARGETS]
    assert n_trained(model) == sum(n_parameters(sharing, budget, **size) for size in sizes)
    n, m = (sum(size[side] for size in sizes) for side in ("in_features", "out_features"))
    expected = {
        "shards": 3 * N_LAYERS * (n + m),
        "input": 4 * (n + N_LAYERS * m),
        "output": 4 * (N_LAYERS * n + m),
    }
    assert n_trained(model) == expected[sharing]


def test_layers_draw_their_own_shards_from_one_pool_and_a_and_b_apart():
    model = adapted()
    found = [layer for name, layer in layers(model).items() if name.endswith("q_proj")]
    for side in ("lora_A", "lora_B"):
        factors = [getattr(layer, side)["default"] for layer in found]
        publics = {id(factor._owned_elsewhere[0] if factor._owned_elsewhere else factor) for factor in factors}
        assert len(publics) == 1
        assert [factor.public is not None for factor in factors] == [True, False, False, False]
        assert len({tuple(factor.index[:3].flatten().tolist()) for factor in factors}) == N_LAYERS
    assert not torch.equal(found[0].lora_A["default"].index[:3], found[0].lora_B["default"].index[:3])  # same sizes
    other = layers(adapted(seed=1))
    same = layers(adapted())
    for name, layer in layers(model).items():
        assert torch.equal(layer.lora_A["default"].index, same[name].lora_A["default"].index)
    name = next(iter(other))
    assert not torch.equal(other[name].lora_A["default"].index, layers(model)[name].lora_A["default"].index)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_the_update_and_its_gradient_are_those_of_factors_put_together_by_hand(sharing, tokens):
    base = llama().double()
    model = adapted(base=base, sharing=sharing, init_lora_weights=False).double()
    pools, updates = {}, {}
    for name, layer in layers(model).items():
        vectors = []
        for side in ("lora_A", "lora_B"):
            factor = getattr(layer, side)["default"]
            key = side, name.rpartition(".")[2]
            if factor.public is not None:
                pools[key] = factor.public.detach().clone().requires_grad_()
            own = [] if factor.private is None else [factor.private.detach().clone().requires_grad_()]
            pools.update(zip([(side, name)], own, strict=False))
            shards = torch.cat(([pools[key]] if key in pools else []) + own)
            rows = [torch.cat([shards[int(place)] for place in row]) for row in factor.index]
            vectors.append(torch.stack(rows))
        updates[f"{name}.weight"] = 2.0 * vectors[1].mT @ vectors[0]  # lora_alpha / r
        torch.testing.assert_close(layer.get_delta_weight("default"), updates[f"{name}.weight"], rtol=1e-12, atol=1e-14)
    fresh = llama().double()
    weights = {name: value + updates.get(name, 0) for name, value in fresh.named_parameters()}
    torch.func.functional_call(fresh, weights, kwargs={"input_ids": tokens, "labels": tokens}).loss.backward()
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name, layer in layers(model).items():
        for side in ("lora_A", "lora_B"):
            factor = getattr(layer, side)["default"]
            if factor.public is not None:
                expected = pools[side, name.rpartition(".")[2]].grad
                torch.testing.assert_close(factor.public.grad, expected, rtol=1e-7, atol=1e-12)
            if factor.private is not None:
                torch.testing.assert_close(factor.private.grad, pools[side, name].grad, rtol=1e-7, atol=1e-12)


def test_all_shards_private_is_lora_step_for_step(tokens):
    model = adapted(r=3, pool_rank=3, private_rank=3, shards_per_vector=2, lora_alpha=6)
    plain = get_peft_model(llama(), LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    for name, layer in layers(plain).items():
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(layers(model)[name].lora_A["default"].weight)
    for _ in range(5):
        torch.testing.assert_close(train(model, tokens, steps=1), train(plain, tokens, steps=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_file_has_each_pool_once_and_what_was_drawn(sharing, tokens, tmp_path):
    model = adapted(sharing=sharing)
    expected = train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    numbers = sum(value.numel() for name, value in tensors.items() if not name.endswith(".index"))
    assert numbers == n_trained(model)
    assert sum(name.endswith(".index") for name in tensors) == 2 * len(layers(model))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    loaded.peft_config["default"].seed = 9
    assert torch.equal(logits(loaded.eval(), tokens), expected)
    model.save_pretrained(tmp_path / "other")
    saved = ShardLoraConfig.from_pretrained(tmp_path / "other")
    saved.seed = 9  # the file says what was drawn, whatever the seed
    again = PeftModel.from_pretrained(llama(), tmp_path / "other", config=saved)
    assert torch.equal(logits(again.eval(), tokens), expected)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_exported_merged_unmerged_combined_and_deleted(sharing, tokens, tmp_path):
    model, base = adapted(sharing=sharing, lora_dropout=0.1), logits(llama(), tokens)
    train(model, tokens)
    expected = logits(model.eval(), tokens)
    assert (expected - base).abs().max() > 1e-3
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(llama(), tmp_path / "plain").eval()
    assert plain.peft_config["default"].r == 4
    torch.testing.assert_close(logits(plain, tokens), expected, rtol=1e-6, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), expected)
    model.add_adapter("other", config(sharing=sharing, seed=1, init_lora_weights=False))
    model.add_weighted_adapter(["default", "other"], [1.0, -0.5], "sum", combination_type="cat")
    for layer in layers(model).values():
        wanted = layer.get_delta_weight("default") - 0.5 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("sum"), wanted, rtol=1e-5, atol=1e-6)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens), expected)
    twin = copy.deepcopy(model)
    train(twin, tokens)
    assert torch.equal(logits(model, tokens), expected)  # a copy has pools of its own


def test_an_adapter_beside_a_frozen_one_leaves_it_frozen(tokens):
    model = adapted()
    model.set_requires_grad("default", requires_grad=False)
    model.add_adapter("other", config(seed=1))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set()
    model.set_adapter("other")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".other." in name for name in trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bases_of_16_bits(dtype, tokens, tmp_path):
    model = adapted(base=llama().to(dtype))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model, tokens).dtype == dtype
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama().to(dtype), tmp_path).eval()
    assert torch.equal(logits(again, tokens), logits(model.eval(), tokens))


def test_patterns_join_kinds_of_one_shape():
    model = adapted(base=tiny_bert(), share=["*.query", "*.value"], target_modules=["query", "value"], task_type=None)
    both = adapted(base=tiny_bert(), share=["*attention*"], target_modules=["query", "value"], task_type=None)
    assert n_trained(model) == n_trained(both)
    owners = [
        sum(layer.lora_A["default"].public is not None for layer in layers(each).values()) for each in (model, both)
    ]
    assert owners == [2, 1]


def test_ranks_may_differ():
    model = adapted(sharing="input", rank_pattern={"layers.1.self_attn.q_proj": 2})
    short = layers(model)["model.layers.1.self_attn.q_proj"].lora_A["default"]
    whole = layers(model)["model.layers.0.self_attn.q_proj"].lora_A["default"]
    assert torch.equal(short.weight, whole.weight[:2])


def test_indices_that_are_missing_or_altered_are_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith(".index"))
    for changed, message in (
        ({name: value for name, value in tensors.items() if name != key}, r"lacks '.*\.index', which says of which"),
        (tensors | {key: tensors[key] + 10_000}, r"whole numbers from 0 to \d+ are expected"),
        (tensors | {key: tensors[key] - 10_000}, r"whole numbers from 0 to \d+ are expected"),
        (tensors | {key: tensors[key][:2].clone()}, r"of shape \(2, 2\) and dtype"),
        (tensors | {key: tensors[key].float()}, r"dtype torch.float32"),
    ):
        save_file(changed, path)
        with pytest.raises(AdapterConfigError, match=message):
            PeftModel.from_pretrained(llama(), tmp_path)


def test_what_reads_lora_alone_says_what_to_do(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "mine")
    with pytest.raises(EigenPeftError, match=r"'SHARDLORA'; write it as a plain LoRA adapter first"):
        AdapterCollection.from_pretrained(tmp_path / "mine")
    store = AdapterStore(random_subspace(llama(), TARGETS))
    with pytest.raises(EigenPeftError, match="SHARDLORA"):
        store.add(model, name="mine")
    export_lora(model, tmp_path / "plain")
    assert len(AdapterCollection.from_pretrained(tmp_path / "plain")) == 1


def test_adapters_of_a_model_are_merged_as_updates(tokens):
    model = adapted(init_lora_weights=False)
    model.add_adapter("other", config(sharing="input", init_lora_weights=False))
    merged = merge(model, rule="mean", rank=None)
    for name, layer in layers(model).items():
        lora_B, lora_A = merged.factors[name]
        mean = (layer.get_delta_weight("default") + layer.get_delta_weight("other")) / 2
        torch.testing.assert_close(lora_B @ lora_A, mean, rtol=1e-4, atol=1e-5)


def test_refusals():
    for settings, message in (
        ({"sharing": "both"}, r"sharing='both' must be one of 'shards', 'input', 'output'"),
        ({"pool_rank": 0}, r"pool_rank=0 must be a whole number of at least 1"),
        ({"private_rank": -1}, r"private_rank=-1 must be a whole number of at least 0"),
        ({"shards_per_vector": 1.5}, r"shards_per_vector=1.5 must be a whole number"),
        ({"private_rank": 4}, r"private_rank=4 is a part of pool_rank=3 and of r=4"),
        ({"share": "all"}, r"share='all' must be 'layers' or a list of patterns"),
        ({"use_dora": True}, r"use_dora=True is not supported"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' must be one of"),
    ):
        with pytest.raises(AdapterConfigError, match=message):
            config(**settings)
    for settings, message in (
        ({"r": 16}, r"r=16 is too much for .*: 4 layers share, .* gives them 8 common vectors.*r of at most 9"),
        ({"shards_per_vector": 5}, r"shards_per_vector=5 does not divide the 32 inputs of"),
        ({"target_modules": ["embed_tokens"]}, r"is for linear layers, and 'model.embed_tokens' is of the kind"),
    ):
        with pytest.raises(AdapterConfigError, match=message):
            adapted(**settings)


def test_what_pairs_or_pads_factors_refuses_shards_by_name():
    with pytest.raises(AdapterConfigError, match="ShardLoRA's layers share theirs"):
        create_lorafa_optimizer(adapted(), r=4, lora_alpha=8, lr=1e-3)
    with pytest.raises(AdapterConfigError, match=r"target_rank=8: its layers share the vectors .* \(ShardLoRA\)"):
        prepare_model_for_compiled_hotswap(adapted(), target_rank=8)
