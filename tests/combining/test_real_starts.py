"""The ten shipped adapters of all-MiniLM-L6-v2 as starts: a merge, a mixture, their components, the nearest one."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from eigenpeft import (
    AdapterCollection,
    AdapterStore,
    EigenLoraConfig,
    SubspaceBuilder,
    export_lora,
    merge,
)
from eigenpeft.audit import nearest_adapters
from eigenpeft.combining import choose_scale, init_lora_from_merge
from eigenpeft.demo.assets import banking77, base_model, shipped_adapters
from eigenpeft.tuners import init_lora_from_adapter, init_lora_from_subspace

pytestmark = pytest.mark.slow
N_LABELS, N_MODULES, T = 6, 12, 10


@pytest.fixture(scope="module")
def adapters():
    return AdapterCollection.from_pretrained(shipped_adapters())


@pytest.fixture(scope="module")
def subspace(adapters):
    return SubspaceBuilder(16).fit(adapters).subspace_


@pytest.fixture(scope="module")
def batch():
    labels = sorted({row["label"] for row in banking77("train")})[:N_LABELS]
    rows = [row for row in banking77("train") if row["label"] in labels]
    rows = [row for label in labels for row in [row for row in rows if row["label"] == label][:3]]
    tokens = AutoTokenizer.from_pretrained(base_model())(
        [row["text"] for row in rows], padding=True, return_tensors="pt"
    )
    return {**tokens, "labels": torch.tensor([labels.index(row["label"]) for row in rows])}


def fresh():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=N_LABELS).eval()


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


def train(model, batch, *, steps=3):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits(model, batch)


def same(folder, batch, expected):
    plain = PeftModel.from_pretrained(fresh(), folder)
    torch.testing.assert_close(logits(plain, batch), expected, rtol=1e-5, atol=1e-5)
    return plain.peft_config["default"]


def numbers(model):
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return sum(p.numel() for name, p in trained if "modules_to_save" not in name)


def test_a_merged_start(adapters, subspace, batch, tmp_path):
    merged = fresh()
    merge(adapters, rule="mean", progress=False).scaled(3.0).apply_to(merged)
    config = EigenLoraConfig(
        subspace=subspace, r=8, init_from="mean", init_adapters=adapters, init_scale=3.0, task_type="SEQ_CLS"
    )
    model = get_peft_model(fresh(), config)
    torch.testing.assert_close(logits(model, batch), logits(merged, batch), rtol=1e-5, atol=1e-5)
    expected = train(model, batch)
    model.save_pretrained(tmp_path / "mine")
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(), tmp_path / "mine"), batch), expected)
    export_lora(model, tmp_path / "plain")
    assert same(tmp_path / "plain", batch, expected).r <= T * 8 + 8

    scale = choose_scale(fresh(), adapters=adapters, batches=[batch], grid=(0.5, 2.0), metric="loss")
    model = init_lora_from_merge(fresh(), adapters=adapters, scale=scale, r=8, task_type="SEQ_CLS")
    expected = train(model, batch)
    export_lora(model, tmp_path / "lora")
    assert same(tmp_path / "lora", batch, expected).r == T * 8 + 8


def test_a_mixture(adapters, batch, tmp_path):
    whole = SubspaceBuilder().fit(adapters).subspace_
    store = AdapterStore.from_collection(whole, adapters)
    counts = {}
    for weights in ("adapter", "module"):
        config = EigenLoraConfig(core="mixture", sources=store, weights=weights, task_type="SEQ_CLS")
        model = get_peft_model(fresh(), config)
        counts[weights] = numbers(model)
        layer = next(layer for layer in model.modules() if isinstance(layer, LoraLayer))
        before = layer.lora_B["default"].weights.detach().clone()
        expected = train(model, batch)
        assert not torch.equal(layer.lora_B["default"].weights, before)
        export_lora(model, tmp_path / weights)
        same(tmp_path / weights, batch, expected)
    assert counts == {"adapter": T, "module": T * N_MODULES}

    name = store.names[3]
    start = [float(each == name) for each in store.names]
    model = get_peft_model(fresh(), EigenLoraConfig(core="mixture", sources=store, init_weights=start))
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            left, right = store.factors(name, module=whole.find(path))
            torch.testing.assert_close(layer.get_delta_weight("default"), left @ right, rtol=1e-5, atol=1e-7)


def test_components_and_the_nearest_adapter(adapters, subspace, batch, tmp_path):
    model = init_lora_from_subspace(fresh(), subspace=subspace, r=8, task_type="SEQ_CLS")
    torch.testing.assert_close(logits(model, batch), logits(fresh(), batch))
    assert numbers(model) == N_MODULES * 2 * 8 * 384
    expected = train(model, batch)
    model.save_pretrained(tmp_path / "init")
    same(tmp_path / "init", batch, expected)

    found = nearest_adapters(adapters, model=fresh(), batches=[batch])
    assert set(found.adapters) == set(adapters.names)
    model = init_lora_from_adapter(fresh(), adapters=adapters, name=next(iter(found.adapters)), task_type="SEQ_CLS")
    expected = train(model, batch)
    model.save_pretrained(tmp_path / "nearest")
    same(tmp_path / "nearest", batch, expected)
