"""Collections: opened lazily, checked as a whole, read one module at a time, scaling folded in once."""

import json
import pickle
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from eigenpeft.collection import AdapterCollection
from eigenpeft.collection.formats.weights import SafetensorsFile
from eigenpeft.errors import CollectionError
from tests.collection.conftest import COMMIT
from tests.factories import MODULES, make_collection, random_factors, write_adapter

QUERY = "layer.0.query"


def assert_updates(collection, updates, *, rtol=1e-5, atol=1e-5):
    for module in collection.modules:
        for read in collection.factors(module):
            delta_weight = read.lora_B.double() @ read.lora_A.double()
            torch.testing.assert_close(delta_weight, updates[read.adapter][module], rtol=rtol, atol=atol)


@pytest.fixture
def three(tmp_path):
    return make_collection(tmp_path / "adapters", n_adapters=3)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("as_bin", [False, True])
@pytest.mark.parametrize(
    "key", ["base_model.model.{module}.lora_{factor}.weight", "{module}.lora_{factor}.default.weight"]
)
def test_factors_are_the_updates(tmp_path, use_rslora, as_bin, key):
    made = make_collection(
        tmp_path, n_adapters=4, rank=(1, 4, 7), lora_alpha=(8, 2.5), use_rslora=use_rslora, as_bin=as_bin, key=key
    )
    collection = AdapterCollection.from_pretrained(tmp_path)
    assert collection.names == tuple(made.names)
    assert collection.modules == tuple(MODULES)
    assert collection.shapes == MODULES
    assert collection.base_model == "tiny/base"
    assert_updates(collection, made.updates)


def test_patterns_of_rank_and_alpha(tmp_path):
    factors = random_factors(rank=4) | random_factors(modules={"layer.1.value": (16, 20)}, rank=2, seed=1)
    write_adapter(tmp_path / "one", factors, r=4, lora_alpha=8, alpha_pattern={r"layer\.0\..*": 6, "value": 5})
    expected = {"layer.0.query": 6 / 4, "layer.0.value": 6 / 4, "layer.1.query": 8 / 4, "layer.1.value": 5 / 2}
    updates = {module: expected[module] * (B.double() @ A.double()) for module, (B, A) in factors.items()}
    assert_updates(AdapterCollection.from_pretrained(tmp_path), {"one": updates})


@pytest.mark.parametrize(
    ("dtype_B", "dtype_A", "expected"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_factors_are_folded_in_float32_or_better(tmp_path, dtype_B, dtype_A, expected):
    # 4 * 60000 is beyond float16.
    factors = {QUERY: (torch.full((12, 2), 60000.0).to(dtype_B), torch.ones(2, 20, dtype=dtype_A))}
    write_adapter(tmp_path / "one", factors, lora_alpha=8)
    write_adapter(tmp_path / "two", {QUERY: tuple(factor.float() for factor in factors[QUERY])}, lora_alpha=8)
    collection = AdapterCollection.from_pretrained(tmp_path)
    one, two = collection.factors(QUERY)
    assert {one.lora_A.dtype, one.lora_B.dtype, two.lora_A.dtype, two.lora_B.dtype} == {expected}
    torch.testing.assert_close(one.lora_B, 4 * factors[QUERY][0].to(expected))
    assert {"same_start", "near_duplicate"} == {finding.kind for finding in collection.diagnose(progress=False)}


def test_opening_and_one_module_read_no_more_than_that(three, monkeypatch):
    keys = []
    read = SafetensorsFile.read_many
    monkeypatch.setattr(SafetensorsFile, "read_many", lambda self, *own: keys.extend(own) or read(self, *own))
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, key: pytest.fail(f"{key} alone"))
    collection = AdapterCollection.from_pretrained(three.folder)
    assert keys == []
    collection.factors(QUERY)
    assert len(keys) == 6
    assert all(QUERY in key for key in keys)


def test_records_are_json_and_tell_no_local_folder(three):
    (three.folder / "adapter-1" / "README.md").write_text("---\nlicense: mit\n---\n")
    collection = AdapterCollection.from_pretrained(three.folder)
    adapter = collection["adapter-1"]
    assert (adapter.name, adapter.rank, adapter.lora_alpha, adapter.task_type) == ("adapter-1", 4, 8.0, "CAUSAL_LM")
    with pytest.warns(DeprecationWarning, match=r"licence is deprecated .* use SourceAdapter\.license"):
        assert adapter.licence == "mit"
    assert (adapter.license, adapter.revision, adapter.modules) == ("mit", None, tuple(MODULES))
    assert adapter.source == str(three.folder / "adapter-1")
    assert json.loads(json.dumps(asdict(adapter)))["name"] == "adapter-1"
    record = json.loads(json.dumps(adapter.record()))
    assert str(three.folder.parent) not in json.dumps(record)
    assert record["source"] == "adapter-1"
    assert record["sha256"] == adapter.sha256
    assert len({info.sha256 for info in collection.adapters}) == 3


def test_folders_and_hub_ids_in_any_mix(three, hub):
    cache = hub("owner/lora", revision="v1")
    write_adapter(three.folder.parent / "single", random_factors())
    sources = ["owner/lora@v1", three.folder, str(three.folder.parent / "single")]
    collection = AdapterCollection.from_pretrained(sources, cache_dir=cache, local_files_only=True)
    assert collection.names == ("lora", *three.names, "single")
    assert len(collection.factors(QUERY)) == 5
    record = collection["lora"].record()
    assert (record["source"], record["revision"]) == ("owner/lora@v1", COMMIT)


def test_modules_missing_from_some(tmp_path):
    write_adapter(tmp_path / "both", random_factors())
    write_adapter(tmp_path / "query", random_factors(modules={QUERY: (12, 20)}))
    collection = AdapterCollection.from_pretrained(tmp_path)
    assert collection.modules == tuple(MODULES)
    assert collection.names_with(QUERY) == ("both", "query")
    assert collection.names_with("layer.1.value") == ("both",)
    assert [read.adapter for read in collection.factors("layer.1.value")] == ["both"]
    with pytest.raises(KeyError, match=r"'layer.9' is not adapted by any of the 2 adapters"):
        collection.factors("layer.9")


def test_modules_are_in_natural_order(tmp_path):
    names = [f"h.{i}.{part}" for i in (10, 2, 1) for part in ("mlp", "attn")]
    write_adapter(tmp_path, random_factors(modules=dict.fromkeys(names, (4, 4))))
    expected = ("h.1.attn", "h.1.mlp", "h.2.attn", "h.2.mlp", "h.10.attn", "h.10.mlp")
    assert AdapterCollection.from_pretrained(tmp_path).modules == expected


def test_fan_in_fan_out_is_the_configs(tmp_path):
    write_adapter(tmp_path / "a", random_factors(), fan_in_fan_out=True)
    write_adapter(tmp_path / "b", random_factors(modules={"other": (4, 4)}))
    collection = AdapterCollection.from_pretrained(tmp_path)
    assert collection.fan_in_fan_out(QUERY) is True
    assert collection.fan_in_fan_out("other") is False


def test_heads_and_embeddings_are_kept_aside(tmp_path):
    extra = {
        "base_model.model.score.weight": torch.ones(3, 20),
        "base_model.model.wte.lora_embedding_A": torch.ones(4, 50),
        "base_model.model.wte.lora_embedding_B": torch.ones(20, 4),
        "base_model.model.layer.0.query.base_layer.weight": torch.ones(12, 20),
        "base_model.model.layer.0.query.lora_B.bias": torch.ones(12),
    }
    write_adapter(
        tmp_path / "a", random_factors(), extra=extra, modules_to_save=["score"], bias="lora_only", lora_bias=True
    )
    collection = AdapterCollection.from_pretrained(tmp_path)
    assert collection.modules == tuple(MODULES)
    assert set(collection.adapters[0].kept_aside) == set(extra)
    (finding,) = collection.findings
    assert (finding.kind, finding.adapters, finding.value) == ("kept_aside", ("a",), 5.0)
    assert "base_layer.weight" in finding.message


def test_prefixes_are_aligned_and_reported(tmp_path):
    factors = random_factors()
    write_adapter(tmp_path / "full", {f"bert.{module}": pair for module, pair in factors.items()})
    # The pattern speaks of the adapter's own names, anchored.
    write_adapter(tmp_path / "short", factors, lora_alpha=4, alpha_pattern={"^layer.0.query": 12})
    collection = AdapterCollection.from_pretrained(tmp_path)
    assert collection.modules == tuple(f"bert.{module}" for module in MODULES)
    assert collection["short"].modules == collection.modules
    full, short = collection.factors(f"bert.{QUERY}")
    torch.testing.assert_close(short.lora_B, 3 * full.lora_B)
    (finding,) = collection.findings
    assert (finding.kind, finding.adapters, finding.value) == ("aligned_names", ("short",), 4.0)
    assert "'layer.0.query' for 'bert.layer.0.query'" in finding.message


def test_subset_and_without(three):
    collection = AdapterCollection.from_pretrained(three.folder)
    kept = collection.subset(["adapter-2", "adapter-0"])
    assert (kept.names, list(kept), len(kept)) == (("adapter-2", "adapter-0"), ["adapter-2", "adapter-0"], 2)
    assert collection.without("adapter-1").names == ("adapter-0", "adapter-2")
    assert "adapter-1" in collection
    assert "adapter-1" not in kept
    assert_updates(kept, three.updates)
    for call in (
        lambda: collection.subset(["adapter-9"]),
        lambda: collection.without("adapter-9"),
        lambda: collection.factors(QUERY, names=["adapter-0", "adapter-9"]),
        lambda: next(collection.each_factors(QUERY, names=iter(["adapter-9"]))),
    ):
        with pytest.raises(CollectionError, match=r"'adapter-9' is not in the collection, which has 'adapter-0'"):
            call()
    with pytest.raises(CollectionError, match="No adapter would be left of the 3"):
        collection.without(*collection.names)


def test_close_pickle_and_context(three):
    with AdapterCollection.from_pretrained(three.folder) as collection:
        collection.factors(QUERY)
    assert_updates(collection, three.updates)
    assert_updates(pickle.loads(pickle.dumps(collection)), three.updates)  # noqa: S301 (our own bytes)
    assert repr(collection) == "AdapterCollection(adapters=3, modules=4, base_model='tiny/base')"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("position", "factor"), [(0, "lora_B"), (1, "lora_A")])
def test_numbers_that_are_not_finite_name_adapter_module_and_factor(three, value, position, factor):
    for name in ("bad-1", "bad-2"):
        factors = random_factors()
        factors[QUERY][position][1, 1] = value
        write_adapter(three.folder / name, factors)
    collection = AdapterCollection.from_pretrained(three.folder)
    collection.factors("layer.0.value")
    with pytest.raises(
        CollectionError, match=f"'bad-1' has 1 of .* NaN or infinite in {factor} of '{QUERY}'"
    ) as caught:
        collection.factors(QUERY)
    assert len(caught.value.problems) == 2
    with pytest.raises(CollectionError, match="'bad-2'"):
        collection.diagnose(progress=False)


def write_tensors(folder, tensors, **config):
    write_adapter(folder, {}, **config)
    save_file(tensors, folder / "adapter_model.safetensors")


A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({A: torch.ones(4, 8)}, r"'bad' .*has lora_A without lora_B.*'q'"),
        ({B: torch.ones(8, 4)}, r"has lora_B without lora_A"),
        ({A: torch.ones(4, 8), B: torch.ones(8, 3)}, r"lora_A of rank 4 and lora_B of rank 3"),
        (
            {A: torch.ones(2, 8), B: torch.ones(8, 2)},
            r"factors of rank 2 where its config says 4.*correct r or rank_pattern",
        ),
        ({A: torch.ones(4, 8).int(), B: torch.ones(8, 4)}, r"not floating-point numbers"),
        ({A: torch.ones(0), B: torch.ones(8, 4)}, r"shapes \(0,\) and \(8, 4\), which were not gathered"),
        ({A: torch.ones(4, 0), B: torch.ones(8, 4)}, r"not gathered from a sharded run"),
        ({A: torch.ones(4, 8, 3, 3), B: torch.ones(8, 4, 1, 1)}, r"convolution factors of shapes \(4, 8, 3, 3\)"),
        (
            {A: torch.ones(4, 8), B: torch.ones(8, 4), f"{A[:-13]}lora_magnitude_vector": torch.ones(8)},
            r"lora_magnitude_vector': its update is not s B A",
        ),
        (
            {"base_model.model.score.weight": torch.ones(2, 2)},
            r"no lora_A and lora_B tensors among the 1 .*, only 'base_model.model.score.weight'",
        ),
        ({}, r"no lora_A and lora_B tensors among the 0"),
        (
            {k.replace(".weight", f".{n}.weight"): torch.ones(4, 4) for k in (A, B) for n in ("x", "y")},
            r"the factors of 2 adapters in one file, 'x', 'y'",
        ),
        ({A: torch.ones(4, 8), B: torch.ones(8, 4), A[17:]: torch.ones(4, 8)}, r"stores lora_A twice, in 'q'"),
    ],
)
def test_files_that_contradict_themselves(tmp_path, tensors, message):
    write_tensors(tmp_path / "bad", tensors, r=4)
    with pytest.raises(CollectionError, match=message) as caught:
        AdapterCollection.from_pretrained(tmp_path / "bad")
    assert len(caught.value.problems) == 1


def test_all_problems_come_in_one_message(three):
    folder = three.folder
    write_adapter(folder / "dora", random_factors(), use_dora=True)
    write_adapter(folder / "pissa", random_factors(), init_lora_weights="pissa")
    write_adapter(folder / "other-type", random_factors(), peft_type="IA3")
    write_adapter(folder / "other-base", random_factors(), base_model_name_or_path="another/base")
    write_adapter(folder / "other-rank", random_factors(), r=8, rank_pattern={})
    write_adapter(folder / "wide", random_factors(modules={QUERY: (12, 40), "layer.1.query": (12, 40)}))
    (write_adapter(folder / "no-config", random_factors()) / "adapter_config.json").unlink()
    (write_adapter(folder / "no-weights", random_factors()) / "adapter_model.safetensors").unlink()
    (write_adapter(folder / "no-json", random_factors()) / "adapter_config.json").write_text("{")
    truncated = write_adapter(folder / "truncated", random_factors()) / "adapter_model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    with pytest.raises(CollectionError) as caught:
        AdapterCollection.from_pretrained([folder, "/no/such/folder"])
    assert len(caught.value.problems) == 11
    message = str(caught.value)
    named = (
        "dora",
        "pissa",
        "other-type",
        "other-base",
        "other-rank",
        "wide",
        "no-config",
        "no-weights",
        "no-json",
        "truncated",
    )
    assert all(f"'{name}'" in message for name in (*named, "/no/such/folder"))
    assert "adapter-1" not in message.replace("'adapter-0', 'adapter-1', 'adapter-2'", "")


def test_config_and_weights_of_one_adapter_are_both_told(tmp_path):
    folder = write_adapter(tmp_path / "bad", random_factors(), use_dora=True)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CollectionError) as caught:
        AdapterCollection.from_pretrained(folder)
    assert len(caught.value.problems) == 2


def test_other_base_models(three):
    write_adapter(three.folder / "other", random_factors(), base_model_name_or_path="/models/base")
    write_adapter(three.folder / "unsaid", random_factors(), base_model_name_or_path=None)
    with pytest.raises(
        CollectionError,
        match=r"2 different base models: 'tiny/base' of 'adapter-0', .*'/models/base' of 'other'.*allow_diff",
    ):
        AdapterCollection.from_pretrained(three.folder)
    collection = AdapterCollection.from_pretrained(three.folder, allow_different_base_models=True)
    assert collection.base_model == "tiny/base"
    assert len(collection.without("other")) == 4


def test_shapes_in_conflict_name_the_odd_one(three):
    write_adapter(three.folder / "odd", random_factors(modules=dict.fromkeys(MODULES, (12, 40))))
    with pytest.raises(
        CollectionError, match=r"'odd' adapts 'layer.0.query' as 12 x 40 .*3 of the 4 .* have 12 x 20; so with 3 more"
    ) as caught:
        AdapterCollection.from_pretrained(three.folder, allow_different_base_models=True)
    assert len(caught.value.problems) == 1


def test_nothing_named():
    with pytest.raises(CollectionError, match="No adapters were named"):
        AdapterCollection.from_pretrained([])


def test_no_base_model_said(tmp_path):
    write_adapter(tmp_path, random_factors(), base_model_name_or_path=None)
    assert AdapterCollection.from_pretrained(tmp_path).base_model is None
