"""Starts from a merge: what the core holds, what the frozen offset holds, and that nothing of it is lost on the way."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from eigenpeft import AdapterCollection, AdapterStore, EigenLoraConfig, SubspaceBuilder, export_lora, merge
from eigenpeft.errors import AdapterConfigError, SubspaceError
from tests.peft_suite.random_subspaces import random_subspace as whole_subspace
from tests.tuners.conftest import logits, tiny_llama, train
from tests.tuners.layers.test_kinds import KINDS

MODULES = ["q_proj", "v_proj", "down_proj"]
RANKS = {"first": 4, "second": 2, "third": 3}
K = 4


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Three LoRA adapters on disk, a subspace of K components that holds a part of them, and a store that holds them whole."""
    folder = tmp_path_factory.mktemp("zoo")
    for name, rank in RANKS.items():
        config = LoraConfig(
            r=rank, lora_alpha=2, target_modules=MODULES, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        base = tiny_llama()
        torch.manual_seed(rank)
        get_peft_model(base, config).save_pretrained(folder / "adapters" / name)
    adapters = AdapterCollection.from_pretrained(folder / "adapters")
    SubspaceBuilder(K).fit(adapters).subspace_.save_pretrained(folder / "subspace")
    whole = SubspaceBuilder().fit(adapters).subspace_
    AdapterStore.from_collection(whole, adapters).save_pretrained(folder / "store")
    return folder


def started(zoo, **settings):
    defaults = {"subspace": str(zoo / "subspace"), "r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    if settings.get("init_from") in ("mean", "ties", "dare", "task_arithmetic"):
        defaults["init_adapters"] = str(zoo / "adapters")
    return get_peft_model(tiny_llama(), EigenLoraConfig(**defaults | settings)).eval()


def updates(model):
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").double()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def merged(zoo, **settings):
    return merge(str(zoo / "adapters"), progress=False, **settings)


def same_update(model, factors):
    found = updates(model)
    assert found.keys() == factors.keys()
    for name, (left, right) in factors.items():
        update = left.double() @ right.double()  # which LoRA keeps transposed for embeddings
        update = update if update.shape == found[name].shape else update.mT
        torch.testing.assert_close(found[name], update, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("core", ["low_rank", "full", "diagonal"])
@pytest.mark.parametrize(
    ("rule", "scale", "options"),
    [("mean", 2.0, None), ("mean", "auto", None), ("ties", None, {"density": 0.4}), ("dare", 0.5, {"drop": 0.3})],
)
def test_starts_at_the_merge_exactly(zoo, core, rule, scale, options):
    model = started(zoo, core=core, init_from=rule, init_scale=scale, init_options=options)
    same_update(model, merged(zoo, rule=rule, scale=scale, **options or {}).factors)


def test_the_core_holds_the_leading_triplets_of_the_projection(zoo):
    model, factors = started(zoo, init_from="mean"), merged(zoo, rule="mean").factors
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            left, right = factors[name.removeprefix("base_model.model.")]
            inside, outside = layer.lora_A["default"], layer.lora_B["default"]
            v_out, v_in = outside.frozen_bank.components_out.double(), inside.frozen_bank.components_in.double()
            projected = v_out @ left.double() @ right.double() @ v_in.mT
            u, s, vh = torch.linalg.svd(projected)
            held = layer.scaling["default"] * (outside.coefficients @ inside.coefficients).double()
            torch.testing.assert_close(held, u[:, :2] * s[:2] @ vh[:2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("core", ["low_rank", "full", "diagonal"])
def test_the_start_is_in_every_form_of_the_adapter(zoo, core, tokens, tmp_path):
    model = started(zoo, core=core, init_from="mean", init_scale=3.0)
    at_start = logits(model, tokens)
    expected = train(model, tokens)
    assert (expected - at_start).abs().max() > 1e-3
    config = model.peft_config["default"]
    json.dumps(config.to_dict() | {"target_modules": None})
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert [saved[name] for name in ("init_from", "init_adapters", "init_scale")] == [None] * 3
    for low in (False, True):
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", low_cpu_mem_usage=low).eval()
        assert torch.equal(logits(again, tokens), expected)
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    torch.testing.assert_close(logits(plain, tokens), expected, rtol=1e-5, atol=1e-5)
    assert plain.peft_config["default"].r <= sum(RANKS.values()) + (2 if core == "low_rank" else K)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, tokens), logits(tiny_llama(), tokens), rtol=0, atol=0)


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_weighted_sums_contain_the_offsets(zoo, combination):
    model = started(zoo, init_from="mean")
    model.add_adapter(
        "other",
        EigenLoraConfig(
            subspace=str(zoo / "subspace"), r=2, init_from="ties", init_adapters=str(zoo / "adapters"), init_scale=2.0
        ),
    )
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    expected = [0.5 * each.get_delta_weight("default") - 2 * each.get_delta_weight("other") for each in layers]
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", combination_type=combination, svd_rank=26)
    for layer, update in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("sum"), update, rtol=1e-4, atol=1e-5)


def test_entrywise_sums_of_adapters_with_offsets_are_refused(zoo):
    model = started(zoo, init_from="mean")
    with pytest.raises(
        AdapterConfigError, match=r"combination_type='linear' works on factors of one rank, and 'default' has"
    ):
        model.add_weighted_adapter(["default"], [0.5], "sum", combination_type="linear")


def test_members_of_a_store_are_merged_as_adapters_are(zoo):
    store = AdapterStore.from_pretrained(zoo / "store")
    for adapters in (store, str(zoo / "store")):
        model = started(zoo, init_from="mean", init_adapters=adapters)
        same_update(model, merge(store, rule="mean", progress=False).factors)
    model = started(zoo, subspace=str(zoo / "store"), core="full", init_from="mean", init_adapters=str(zoo / "store"))
    assert model.peft_config["default"].offset_ranks is None  # its own bases hold it
    same_update(model, merge(store, rule="mean", progress=False).factors)


def test_a_folder_that_a_merge_wrote(zoo, tmp_path, caplog):
    merged(zoo, rule="ties").save_pretrained(tmp_path / "merged")
    factors = merged(zoo, rule="ties").factors
    doubled = {name: (2 * left, right) for name, (left, right) in factors.items()}
    same_update(started(zoo, init_from=str(tmp_path / "merged"), init_scale=2.0), doubled)
    with caplog.at_level(logging.WARNING):
        model = started(zoo, core="full", init_from=str(tmp_path / "merged"), init_offset=False)
    assert model.peft_config["default"].offset_ranks is None
    assert "of the update's squared norm; the rest is left out" in caplog.text
    subspace = AdapterStore.from_pretrained(zoo / "store").subspace  # holds what the merge of its adapters spans
    caplog.clear()
    same_update(started(zoo, subspace=subspace, core="full", init_from=str(tmp_path / "merged")), factors)
    assert "left out" not in caplog.text


@pytest.mark.parametrize("offset", [True, False])
def test_one_adapter_with_and_without_what_the_core_cannot_hold(zoo, offset):
    source = zoo / "adapters" / "first"
    model = started(zoo, init_from=str(source), init_offset=offset)
    whole = updates(PeftModel.from_pretrained(tiny_llama(), source))
    errors = [(updates(model)[name] - update).norm() / update.norm() for name, update in whole.items()]
    assert all(error < 1e-5 if offset else error > 1e-2 for error in errors)


def test_embeddings_have_offsets_too(tmp_path):
    for seed in range(2):
        base = tiny_llama()
        torch.manual_seed(seed)
        config = LoraConfig(r=3, target_modules=["embed_tokens"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(tmp_path / f"adapters/{seed}", save_embedding_layers=False)
    adapters = AdapterCollection.from_pretrained(tmp_path / "adapters", embeddings=True)
    subspace = SubspaceBuilder(3).fit(adapters).subspace_
    config = EigenLoraConfig(subspace=subspace, r=2, init_from="mean", init_adapters=str(tmp_path / "adapters"))
    model = get_peft_model(tiny_llama(), config)
    same_update(model, merge(adapters, rule="mean", progress=False).factors)
    tokens = torch.arange(12)[None]
    expected = logits(model.eval(), tokens)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), expected, rtol=1e-5, atol=1e-5)


def test_a_store_refuses_what_its_bases_do_not_hold(zoo):
    store = AdapterStore(AdapterStore.from_pretrained(zoo / "store").subspace.truncate(K))
    model = started(zoo, subspace=store.subspace, init_from="mean")
    with pytest.raises(SubspaceError, match=r"has an offset beside its cores .*export_lora"):
        store.add(model, name="mine")


def test_altered_files_are_refused(zoo, tmp_path):
    model = started(zoo, init_from="mean")
    model.save_pretrained(tmp_path / "adapter")
    path, config = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_config.json"
    # Copies: old versions of safetensors write into the file that these are mapped from.
    tensors, text = {name: tensor.clone() for name, tensor in load_file(path).items()}, config.read_text()
    key = next(key for key in tensors if key.endswith("lora_B.offset"))
    changes = {
        r"lacks '.*lora_B\.offset'": {name: value for name, value in tensors.items() if name != key},
        r"lora_B\.offset' of shape": tensors | {key: torch.zeros(3, 3)},
        r"where \(32, \d\) finite": tensors | {key: tensors[key] * float("nan")},
        r"has, and its config does not say, 'x\.lora_B\.offset'": tensors
        | {"base_model.model.x.lora_B.offset": tensors[key].clone()},
    }
    for message, changed in changes.items():
        save_file(changed, path)
        with pytest.raises(AdapterConfigError, match=message):
            PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    for value in (0, 10**9, True, "3"):
        altered = json.loads(text)
        altered["offset_ranks"] = dict.fromkeys(altered["offset_ranks"], value)
        config.write_text(json.dumps(altered))
        with pytest.raises(AdapterConfigError, match=r"offset_ranks\['model.*must be a whole number between 1 and 32"):
            PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")


def test_a_file_cannot_make_its_reader_start_from_anything(zoo, tmp_path, caplog):
    started(zoo, init_from="mean").save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_from": "mean", "init_adapters": "/somewhere"}))
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert "init_from='mean', init_adapters='/somewhere' in an adapter's file is passed over" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_from": "mean"}, r"init_from='mean' is a merging rule: say which adapters it merges with init_adapters"),
        ({"init_from": "average", "init_adapters": "x"}, r"'average' is not one; pass one of 'task_arithmetic'"),
        ({"init_adapters": "x"}, r"None is not one; pass one of"),
        ({"init_from": "regmean", "init_adapters": "x"}, r"needs statistics of each task's inputs: merge"),
        (
            {"init_from": "ties", "init_adapters": "x", "init_options": {"p": 1}},
            r"init_from='ties' with init_options=\{'p': 1\}: p=1 is not an option of rule='ties'",
        ),
        ({"init_from": "folder", "init_options": {"density": 0.1}}, r"are options of a merging rule"),
        ({"init_from": "folder", "init_scale": "auto"}, r"init_scale='auto' multiplies what init_from='folder' names"),
        ({"init_scale": 2.0}, r"init_scale=2.0 multiplies what init_from=None names"),
        ({"init_from": "folder", "init_scale": float("nan")}, r"init_scale=nan must be a finite number"),
        ({"init_from": "folder", "init_weights": 1.0}, r"init_weights belong to core='mixture', .* leave them out"),
    ],
)
def test_starts_that_mean_nothing(settings, message):
    with pytest.raises(AdapterConfigError, match=message):
        EigenLoraConfig(subspace="anything", **settings)


def test_adapters_of_another_model_are_refused(zoo):
    subspace = whole_subspace(tiny_llama(), parameters=False)
    with pytest.raises(AdapterConfigError, match=r"none of the adapters' 6 modules"):
        alone = subspace.__class__({"lm_head": subspace["lm_head"]}, info=subspace.info)
        started(zoo, subspace=alone, init_from="mean")


def test_a_convolution_keeps_no_offset(tmp_path):
    make, _, _ = KINDS["conv1d"]
    base = make()
    subspace = whole_subspace(base, parameters=False).truncate(2)
    (module,) = (name for name in subspace if name.startswith("target"))
    linear = torch.nn.Linear(subspace[module].in_features, subspace[module].out_features)
    options = {"r": 3, "init_lora_weights": False}
    plain = torch.nn.ModuleDict({"target": linear})
    get_peft_model(plain, LoraConfig(target_modules=["target"], **options)).save_pretrained(tmp_path)
    config = EigenLoraConfig(
        subspace=subspace, r=2, target_modules=["target"], init_from=str(tmp_path), init_offset=True
    )
    with pytest.raises(AdapterConfigError, match=r"init_offset=True is for linear layers and embeddings"):
        get_peft_model(base, config)
