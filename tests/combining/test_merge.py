"""`merge` against whole matrices: mixed ranks, alphas, rsLoRA and modules; what it writes loads in plain PEFT; heads stay apart."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from eigenpeft import AdapterCollection, AdapterStore, SubspaceBuilder
from eigenpeft.combining import load_head, merge
from eigenpeft.combining.heads import head_files
from eigenpeft.combining.recipe import read_recipe
from eigenpeft.errors import AdapterConfigError, ArtifactError, CollectionError, SubspaceError
from eigenpeft.linalg.merging import RULES, merge_updates
from tests.factories import MODULES, make_collection, random_factors, tiny_bert, tiny_gpt2, tiny_llama, write_adapter

DATA_FREE = [name for name, rule in RULES.items() if "statistics" not in rule.needs]


def whole(merged):
    return {module: (B.double() @ A.double()) for module, (B, A) in merged.factors.items()}


def relative_error(found, expected):
    """Over all modules, Frobenius."""
    difference = sum(float((found[module] - expected[module]).norm()) ** 2 for module in expected)
    return (difference / sum(float(expected[module].norm()) ** 2 for module in expected)) ** 0.5


@pytest.fixture
def mixed(tmp_path):
    """Adapters of several ranks and alphas, one of them rsLoRA and one with half of the modules."""
    make_collection(tmp_path / "zoo", n_adapters=3, rank=(2, 4, 3), lora_alpha=(8, 4, 1), noise=0.3)
    factors = random_factors(rank=5, seed=7)
    write_adapter(tmp_path / "zoo" / "rs", factors, lora_alpha=10, use_rslora=True)
    half = {module: pair for module, pair in random_factors(rank=2, seed=8).items() if "query" in module}
    write_adapter(tmp_path / "zoo" / "half", half, lora_alpha=6)
    return tmp_path / "zoo"


def updates_on_disk(folder):
    """ΔW by adapter and module, by hand from the files."""
    found = {}
    for path in sorted(folder.iterdir()):
        config, tensors = (
            json.loads((path / "adapter_config.json").read_text()),
            load_file(path / "adapter_model.safetensors"),
        )
        r, alpha = config["r"], config["lora_alpha"]
        scaling = alpha / (r**0.5 if config.get("use_rslora") else r)
        modules = sorted({key.removeprefix("base_model.model.").split(".lora_")[0] for key in tensors})
        found[path.name] = {
            module: scaling
            * tensors[f"base_model.model.{module}.lora_B.weight"].double()
            @ tensors[f"base_model.model.{module}.lora_A.weight"].double()
            for module in modules
        }
    return found


def test_weighted_sum_is_exact_whatever_the_ranks_and_alphas(mixed):
    weights = {"adapter-0": 0.5, "adapter-1": 1.0, "adapter-2": -0.7, "half": 2.0, "rs": 0.3}
    merged = merge(mixed, weights=weights, progress=False)
    updates = updates_on_disk(mixed)
    expected = {
        module: sum(weights[name] * own[module] for name, own in updates.items() if module in own) for module in MODULES
    }
    assert relative_error(whole(merged), expected) < 1e-6
    assert {len(A) for _, A in merged.factors.values()} == {merged.rank} == {14}


@pytest.mark.parametrize("rule", DATA_FREE)
def test_every_rule_merges_a_mixed_folder(rule, mixed):
    merged = merge(mixed, rule=rule, rank=4, progress=False)
    assert set(merged.factors) == set(MODULES)
    for module, (lora_B, lora_A) in merged.factors.items():
        assert lora_B.shape == (MODULES[module][0], 4)
        assert lora_A.shape == (4, MODULES[module][1])
        assert lora_A.isfinite().all()
        assert lora_B.isfinite().all()
    assert merged.report.rank == 4
    assert 0 < merged.report.kept_share <= 1 + 1e-12


def test_the_number_of_updates_of_a_module_is_that_of_those_who_have_it(mixed):
    merged, updates = merge(mixed, rule="mean", progress=False), updates_on_disk(mixed)
    value = [own["layer.0.value"] for own in updates.values() if "layer.0.value" in own]
    assert len(value) == 4
    torch.testing.assert_close(whole(merged)["layer.0.value"], sum(value) / 4, atol=1e-5, rtol=1e-5)


def test_one_adapter_is_reduced_to_a_rank_with_its_error(mixed):
    merged = merge(mixed / "rs", rank=2, progress=False)
    expected, lost, total = {}, 0.0, 0.0
    for module, update in updates_on_disk(mixed)["rs"].items():
        u, s, vt = np.linalg.svd(update.numpy(), full_matrices=False)
        expected[module] = torch.from_numpy((u[:, :2] * s[:2]) @ vt[:2])
        lost, total = lost + (s[2:] ** 2).sum(), total + (s**2).sum()
    assert relative_error(whole(merged), expected) < 1e-6
    [source] = merged.report.sources
    np.testing.assert_allclose(source.relative_distance, (lost / total) ** 0.5, rtol=1e-5)
    np.testing.assert_allclose(merged.report.kept_share, 1 - lost / total, rtol=1e-5)


def test_order_and_names_do_not_matter(mixed):
    names = ["rs", "adapter-1", "half"]
    collection = AdapterCollection.from_pretrained(mixed)
    one = merge(collection, rule="dare_ties", names=names, seed=3, progress=False)
    other = merge(mixed, rule="dare_ties", names=names[::-1], seed=3, progress=False)
    assert relative_error(whole(other), whole(one)) < 1e-6


def test_the_report_counts_over_all_modules(mixed):
    merged, updates = merge(mixed, rule="mean", rank=3, progress=False), updates_on_disk(mixed)
    found = whole(merged)
    for source in merged.report.sources:
        own = updates[source.name]
        norm = sum(float(update.norm()) ** 2 for update in own.values()) ** 0.5
        distance = sum(float((found[m] - own.get(m, torch.zeros(()))).norm()) ** 2 for m in MODULES) ** 0.5
        np.testing.assert_allclose(source.norm, norm, rtol=1e-5)
        np.testing.assert_allclose(source.relative_distance, distance / norm, rtol=1e-4)
        assert source.n_modules == len(own)
    a, b = (torch.cat([updates[name][m].flatten() for m in MODULES]) for name in ("adapter-0", "adapter-1"))
    np.testing.assert_allclose(merged.report.cosines[0][1], torch.cosine_similarity(a, b, dim=0), rtol=1e-4)
    assert merged.report.norm == pytest.approx(sum(float(found[m].norm()) ** 2 for m in MODULES) ** 0.5, rel=1e-5)
    assert json.loads(json.dumps(merged.report.to_dict())) == merged.report.to_dict() | {
        "calibrate": [],
        "scale_range": list(merged.report.scale_range),
        "sources": [vars(source) for source in merged.report.sources],
        "cosines": [list(row) for row in merged.report.cosines],
        "grid": [],
    }


def test_auto_scale_gives_every_module_the_mean_norm(mixed):
    merged, updates = merge(mixed, scale="auto", progress=False), updates_on_disk(mixed)
    for module, update in whole(merged).items():
        norms = [float(own[module].norm()) for own in updates.values() if module in own]
        assert float(update.norm()) == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    assert merged.report.scale == "auto"
    assert merged.report.scale_range[0] < merged.report.scale_range[1]


def test_the_scale_with_the_best_score_is_kept_and_the_grid_reported(mixed):
    wanted = 0.5 * merge(mixed, progress=False).report.norm

    def score(merged):
        norm = sum(float((B @ A).norm()) ** 2 for B, A in merged.factors.values()) ** 0.5
        return -abs(norm - wanted)

    merged = merge(mixed, scale=[0.3, 0.5, 0.7], score=score, progress=False)
    assert merged.report.scale == 0.5
    assert [entry["scale"] for entry in merged.report.grid] == [0.3, 0.5, 0.7]
    assert merged.report.norm == pytest.approx(wanted, rel=1e-5)


def test_plain_peft_loads_it_and_computes_the_weighted_sum(tmp_path):
    base, ids = tiny_llama(), torch.arange(12).view(2, 6) % 64
    for i, (rank, rslora) in enumerate([(2, False), (4, True), (3, False)]):
        config = LoraConfig(r=rank, lora_alpha=7, use_rslora=rslora, target_modules=["q_proj", "down_proj"])
        model = get_peft_model(tiny_llama(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(i))
        model.save_pretrained(tmp_path / "zoo" / f"task{i}")
    weights = [0.6, -0.4, 0.9]
    merge(tmp_path / "zoo", weights=weights, progress=False).save_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged")
    config = loaded.peft_config["default"]
    assert (config.rank_pattern, config.alpha_pattern, config.r) == ({}, {}, config.lora_alpha)
    # The exact sum by merging each adapter into the base weights.
    with torch.no_grad():
        for i, weight in enumerate(weights):
            single = PeftModel.from_pretrained(tiny_llama(), tmp_path / "zoo" / f"task{i}").merge_and_unload()
            for (_, parameter), own, start in zip(
                base.named_parameters(), single.parameters(), tiny_llama().parameters(), strict=True
            ):
                parameter += weight * (own - start)
        torch.testing.assert_close(loaded(ids).logits, base(ids).logits, atol=2e-5, rtol=1e-4)


def test_transposed_weights_stay_transposed(tmp_path):
    ids = torch.arange(6)[None] % 64
    for i in range(2):
        model = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(i))
        model.save_pretrained(tmp_path / "zoo" / f"task{i}")
    merged = merge(tmp_path / "zoo", progress=False)
    merged.save_pretrained(tmp_path / "merged")
    loaded, base = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "merged"), tiny_gpt2()
    merged.apply_to(base)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(base(ids).logits, tiny_gpt2()(ids).logits, atol=1e-2)


def test_embeddings_are_merged_too(tmp_path):
    ids = torch.arange(6)[None] % 64
    for i in range(2):
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(i))
        # PEFT saves the embedding itself along, the same in every adapter.
        model.save_pretrained(tmp_path / "zoo" / f"task{i}", save_embedding_layers=True)
    merged = merge(tmp_path / "zoo", weights=[1.0, 0.5], progress=False)
    assert [key for key in merged.shared if "embed_tokens" in key]
    assert any("embed_tokens" in module for module in merged.embeddings)
    merged.save_pretrained(tmp_path / "merged")
    loaded, base = PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged"), tiny_llama()
    merged.apply_to(base)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-4)


def test_base_weights_that_differ_are_refused(mixed):
    for i in range(3):
        with_tensor(mixed / f"adapter-{i}", "base_model.model.embed_tokens.weight", (2, 4))
    names = ["adapter-0", "adapter-1"]
    assert list(merge(mixed, names=names, progress=False).shared) == ["base_model.model.embed_tokens.weight"]
    path = mixed / "adapter-1" / "adapter_model.safetensors"
    changed = load_file(path)
    changed["base_model.model.embed_tokens.weight"] += 1e-3
    save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(CollectionError, match="Adapter 'adapter-0' has, besides its factors, other tensors"):
        merge(mixed, names=names, progress=False)


def trained_bert(seed, n_labels=3):
    """A tiny classifier with a trained adapter and head."""
    model = get_peft_model(
        tiny_bert(num_labels=n_labels), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def test_heads_are_kept_one_per_task_and_load(tmp_path):
    ids = torch.arange(6)[None] % 64
    for i, n_labels in enumerate((3, 5)):
        trained_bert(i, n_labels).save_pretrained(tmp_path / "zoo" / f"task{i}")
    merge(tmp_path / "zoo", progress=False).save_pretrained(tmp_path / "merged")
    assert not any("classifier" in key for key in load_file(tmp_path / "merged" / "adapter_model.safetensors"))
    # One adapter alone with weight 1 is itself: with its head back in, the logits are its own.
    for i, n_labels in enumerate((3, 5)):
        weights = [float(i == j) for j in range(2)]
        merge(tmp_path / "zoo", weights=weights, progress=False).save_pretrained(tmp_path / f"only{i}")
        loaded = PeftModel.from_pretrained(tiny_bert(num_labels=n_labels), tmp_path / f"only{i}").eval()
        load_head(loaded, folder=tmp_path / f"only{i}", name=f"task{i}")
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, trained_bert(i, n_labels)(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_head_that_does_not_fit_or_does_not_exist_is_named(tmp_path):
    trained_bert(0).save_pretrained(tmp_path / "zoo" / "task0")
    trained_bert(1).save_pretrained(tmp_path / "zoo" / "task1")
    merged = merge(tmp_path / "zoo", progress=False)
    merged.save_pretrained(tmp_path / "merged")
    with pytest.raises(
        ArtifactError, match=r"'classifier.\w+' has shape .* the model has .*as many labels as the task"
    ):
        load_head(tiny_bert(num_labels=4), folder=tmp_path / "merged", name="task0")
    with pytest.raises(ArtifactError, match=r"name='other' has no head in .*\['task0', 'task1'\]"):
        load_head(tiny_bert(), folder=tmp_path / "merged", name="other")
    with pytest.raises(AdapterConfigError, match=r"head='other' is not one of \['task0', 'task1'\]"):
        merged.save_pretrained(tmp_path / "else", head="other")
    assert not (tmp_path / "else").exists()


@pytest.mark.parametrize("name", ["..", "a/b", "a\\b", "a\0b"])
def test_a_name_that_leads_out_of_the_folder_of_heads_is_refused(name):
    with pytest.raises(ArtifactError, match="cannot be the name of a folder for its head; rename it"):
        head_files({name: {"classifier.weight": torch.ones(2, 2)}})


def test_a_merged_adapter_takes_no_name_that_is_there(tmp_path):
    trained_bert(0).save_pretrained(tmp_path / "zoo" / "task0")
    model = trained_bert(1)
    with pytest.raises(AdapterConfigError, match=r"adapter_name='default' is taken; the model has \['default'\]"):
        merge(tmp_path / "zoo", progress=False).add_to(model, adapter_name="default")


def test_one_head_can_become_the_merged_adapters_own(tmp_path):
    ids = torch.arange(6)[None] % 64
    trained_bert(0).save_pretrained(tmp_path / "zoo" / "task0")
    trained_bert(1).save_pretrained(tmp_path / "zoo" / "task1")
    merged = merge(tmp_path / "zoo", weights=[1.0, 0.0], progress=False)
    merged.save_pretrained(tmp_path / "merged", head="task0")
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trained_bert(0)(ids).logits, atol=1e-5, rtol=1e-4)


def test_one_adapter_keeps_its_head_without_being_asked(tmp_path):
    ids = torch.arange(6)[None] % 64
    trained_bert(0).save_pretrained(tmp_path / "task0")
    merge(tmp_path / "task0", progress=False).save_pretrained(tmp_path / "smaller")
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "smaller").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trained_bert(0)(ids).logits, atol=1e-5, rtol=1e-4)


def test_members_of_a_store_are_merged(mixed):
    collection = AdapterCollection.from_pretrained(mixed)
    subspace = SubspaceBuilder(6).fit(collection).subspace_
    store = AdapterStore.from_collection(subspace, collection)
    merged = merge(store, weights=[1, 2, 3, 4, 5], progress=False)
    expected = {}
    for weight, name in zip([1, 2, 3, 4, 5], store.names, strict=True):
        for module in subspace:
            if (pair := store.factors(name, module=module)) is not None:
                expected[module] = expected.get(module, 0) + weight * pair[0].double() @ pair[1].double()
    assert relative_error(whole(merged), expected) < 1e-6
    assert merged.rank <= 6


def test_heads_of_a_store_are_kept(tmp_path):
    for i in range(2):
        trained_bert(i).save_pretrained(tmp_path / "zoo" / f"task{i}")
    collection = AdapterCollection.from_pretrained(tmp_path / "zoo")
    store = AdapterStore(SubspaceBuilder(4).fit(collection).subspace_)
    for i in range(2):
        store.add(tmp_path / "zoo" / f"task{i}", allow_different_base_models=True)
    assert {name: sorted(head) for name, head in merge(store, progress=False).heads.items()} == {
        name: sorted(head) for name, head in merge(collection, progress=False).heads.items()
    }


def test_adapters_of_a_model_are_merged_and_put_beside_them(tmp_path):
    ids = torch.arange(6)[None] % 64
    model = trained_bert(0)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name and "lora_" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    merged = merge(model, weights={"default": 1.0, "other": 0.0}, progress=False)
    merged.add_to(model, adapter_name="merged")
    with torch.no_grad():
        model.set_adapter("default")
        expected = model.base_model.model.bert(ids).pooler_output
        model.set_adapter("merged")
        torch.testing.assert_close(model.base_model.model.bert(ids).pooler_output, expected, atol=1e-5, rtol=1e-4)


def test_a_merge_replaces_an_older_one_and_leaves_no_stale_head(tmp_path):
    for i in range(3):
        trained_bert(i).save_pretrained(tmp_path / "zoo" / f"task{i}")
    merge(tmp_path / "zoo", progress=False).save_pretrained(tmp_path / "merged")
    fewer = merge(tmp_path / "zoo", names=["task0", "task1"], progress=False)
    with pytest.raises(ArtifactError, match="already holds a plain LoRA adapter; pass overwrite=True"):
        fewer.save_pretrained(tmp_path / "merged")
    fewer.save_pretrained(tmp_path / "merged", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "merged" / "heads").iterdir()) == ["task0", "task1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "zoo"]


def with_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_tensor(folder, key, shape=(12,)):
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {key: torch.ones(shape)}, path, metadata={"format": "pt"})


BAD_ARGUMENTS = {
    "unknown rule": ({"rule": "average"}, AdapterConfigError, "rule='average' is unknown; pass one of"),
    "density out of range": (
        {"rule": "ties", "density": 1.2},
        AdapterConfigError,
        r"density=1.2 must be above 0 and at most 1",
    ),
    "option of another kind": (
        {"rule": "ties", "density": "0.5"},
        AdapterConfigError,
        "density='0.5' must be a number, such as 0.2",
    ),
    "another rule's option": (
        {"rule": "tsv", "density": 0.2},
        AdapterConfigError,
        "density=0.2 is not an option of rule='tsv'",
    ),
    "too few weights": ({"weights": [1.0, 2.0]}, AdapterConfigError, "2 weights do not fit 5 adapters, 'adapter-0'"),
    "weights by unknown name": (
        {"weights": {"adapter-0": 1.0, "nobody": 1.0}},
        AdapterConfigError,
        r"weights name .*'nobody'.* have none",
    ),
    "weight that is no number": (
        {"weights": [1.0, 1.0, 1.0, 1.0, float("inf")]},
        AdapterConfigError,
        "The weight inf of 'rs' is not a finite number",
    ),
    "rank above what is there": (
        {"rank": 15},
        AdapterConfigError,
        "rank=15 is too large: .* Pass at most 14",
    ),
    "rank of zero": ({"rank": 0}, AdapterConfigError, "rank=0 must be None or a whole number of at least 1"),
    "statistics missing": (
        {"rule": "regmean"},
        AdapterConfigError,
        r"rule='regmean' needs statistics .*\(5 of 5\) have none.*collect_statistics",
    ),
    "scale that is no number": ({"scale": "best"}, AdapterConfigError, "scale='best' must be a finite number, 'auto'"),
    "scales without a score": ({"scale": [0.1, 0.2]}, AdapterConfigError, r"scale=\[0.1, 0.2\] with score=None"),
    "unknown calibration": ({"calibrate": ["svd"]}, AdapterConfigError, r"calibrate=\['svd'\] is unknown"),
    "unknown adapter": ({"names": ["nobody"]}, CollectionError, "'nobody' is not in the collection"),
    "mean of nothing": ({"rule": "mean", "weights": [0.0] * 5}, AdapterConfigError, "are all 0, so there is no mean"),
    "mean of nothing in one module": (  # "half" has the queries alone
        {"rule": "mean", "weights": {"adapter-0": 0.0, "adapter-1": 0.0, "adapter-2": 0.0, "half": 1.0, "rs": 0.0}},
        AdapterConfigError,
        r"^Cannot merge '[\w.]*value': .*are all 0, so there is no mean",
    ),
}


@pytest.mark.parametrize("kind", BAD_ARGUMENTS)
def test_bad_arguments_are_named(kind, mixed):
    arguments, error, message = BAD_ARGUMENTS[kind]
    with pytest.raises(error, match=message):
        merge(mixed, progress=False, **arguments)


BAD_ADAPTERS = {
    "DoRA": (lambda folder: with_config(folder, use_dora=True), "has use_dora=True: DoRA also rescales"),
    "another base model": (
        lambda folder: with_config(folder, base_model_name_or_path="other/base"),
        "The adapters name 2 different base models",
    ),
    "another shape": (
        lambda folder: write_adapter(folder, random_factors(modules={"layer.0.query": (12, 21)})),
        "adapts 'layer.0.query' as 12 x 21",
    ),
    "biases of lora_B": (
        lambda folder: with_tensor(folder, "base_model.model.layer.0.query.lora_B.bias"),
        "Adapter 'rs' has, besides its factors, biases of lora_B",
    ),
    "biases of the base": (
        lambda folder: with_tensor(folder, "base_model.model.layer.0.query.bias"),
        "Adapter 'rs' has, besides its factors, biases of the base model",
    ),
    "trained tokens": (
        lambda folder: with_tensor(folder, "base_model.model.embed.token_adapter.trainable_tokens_delta", (2, 4)),
        "Adapter 'rs' has, besides its factors, trained tokens",
    ),
    "another part": (
        lambda folder: with_tensor(folder, "base_model.model.router.weight", (2, 4)),
        "Adapter 'rs' has, besides its factors, other tensors, 'base_model.model.router.weight'",
    ),
    "not finite": (
        lambda folder: with_tensor(folder, "base_model.model.layer.0.query.lora_B.weight", (12, 5)) or damage(folder),
        "NaN or infinite",
    ),
    "a name that is no folder": (lambda folder: None, None),
}


def damage(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.layer.0.query.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", [kind for kind, (_, message) in BAD_ADAPTERS.items() if message])
def test_what_cannot_be_merged_is_refused_by_name(kind, mixed):
    change, message = BAD_ADAPTERS[kind]
    change(mixed / "rs")
    with pytest.raises(CollectionError, match=message):
        merge(mixed, progress=False)


def test_a_folder_of_something_else_is_left_alone(mixed, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds files that eigenpeft did not write: thesis.txt"):
        merge(mixed, progress=False).save_pretrained(tmp_path / "notes")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["thesis.txt"]


def test_experts_and_convolutions_of_a_model_are_refused_by_name():
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(CollectionError, match="Adapter 'default' adapts '0', a convolution"):
        merge(model, progress=False)


def test_a_model_that_lacks_the_modules_is_named(mixed):
    with pytest.raises(AdapterConfigError, match="'layer.0.query' is 0 times in the model"):
        merge(mixed, progress=False).apply_to(tiny_llama())


def test_an_interrupted_merge_goes_on_and_gives_the_same(mixed, tmp_path, monkeypatch):
    expected = merge(mixed, rule="dare_ties", rank=4, seed=3, progress=False)
    calls = []

    def fail_at_third(space, **arguments):
        calls.append(space)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return merge_updates(space, **arguments)

    arguments = {"rule": "dare_ties", "rank": 4, "seed": 3, "work_dir": tmp_path / "work", "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr("eigenpeft.combining.merging.merge_updates", fail_at_third)
        with pytest.raises(KeyboardInterrupt):
            merge(mixed, **arguments)
        with pytest.raises(
            SubspaceError, match="holds an unfinished build of other adapters or settings .*different: rank"
        ):
            merge(mixed, **arguments | {"rank": 5})
        merged = merge(mixed, **arguments)
    assert len(calls) == 5  # two modules were kept of the four
    assert merged.report == expected.report
    for module, (lora_B, lora_A) in expected.factors.items():
        assert torch.equal(merged.factors[module][0], lora_B)
        assert torch.equal(merged.factors[module][1], lora_A)
    assert not (tmp_path / "work").exists()


def test_a_work_folder_needs_adapters_on_disk(tmp_path):
    with pytest.raises(AdapterConfigError, match="work_dir is for adapters on disk"):
        merge(trained_bert(0), work_dir=tmp_path / "work", progress=False)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("options", ["[density]", "0.2", "density"])
def test_options_of_a_recipe_are_names_and_values(tmp_path, options):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"adapters: [first, second]\nrule: ties\noptions: {options}\n")
    with pytest.raises(AdapterConfigError, match=r"recipe.yaml' has options=.*; write names and values"):
        read_recipe(path)
