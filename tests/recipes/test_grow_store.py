"""The recipe in which new tasks grow a store."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertForSequenceClassification

from eigenpeft import AdapterStore
from tests.recipes.tiny import tiny_tokenizer, words
from tests.tuners.conftest import tiny_bert

LINE = r"accuracy (\S+) as trained, (\S+) as a LoRA; the bases held (\S+)% of its update and hold (\S+)%, K up to (\d+)"


@pytest.fixture
def zoo(tmp_path):
    """A base model, four adapters of it and two new tasks on disk; the recipe's arguments."""
    tiny_bert().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for seed in range(4):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
        model = get_peft_model(BertForSequenceClassification.from_pretrained(tmp_path / "base"), config)
        model.save_pretrained(tmp_path / "adapters" / f"old-{seed}")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for split, n in (("train", 24), ("test", 9)):
            rows = [{"text": words(50 + row), "label": row % 3} for row in range(n)]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--adapters", tmp_path / "adapters", "--model", tmp_path / "base", "--tasks", tmp_path / "first"]
    return [
        *given,
        tmp_path / "second",
        "--n_components",
        4,
        "--r",
        2,
        "--steps",
        3,
        "--batch_size",
        4,
        "--out",
        "grown",
    ]


def test_new_tasks_are_absorbed_and_old_members_keep_their_bits(recipe, zoo, tmp_path):
    printed = recipe("grow_store", *zoo, "--temporary", 3, "--held_share", 1.0)
    found = re.findall(LINE, printed)
    assert len(found) == 2
    assert all(trained == plain for trained, plain, *_ in found)
    assert all(float(before) < 99 and float(after) > 99.9 for _, _, before, after, _ in found)
    assert [int(k) for *_, k in found] == [7, 10]  # three directions more per task
    assert printed.count("none changed by a bit") == 2
    store = AdapterStore.from_pretrained(tmp_path / "grown" / "store")
    assert set(store.names) == {"old-0", "old-1", "old-2", "old-3", "first", "second"}
    # The member is the LoRA that was trained.
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    lora = PeftModel.from_pretrained(base, tmp_path / "grown" / "adapters" / "second")
    for module in store["second"]:
        lora_B, lora_A = store.factors("second", module=module)
        expected = lora.base_model.model.get_submodule(module).get_delta_weight("default")
        torch.testing.assert_close(lora_B @ lora_A, expected, rtol=1e-4, atol=1e-6)


def test_without_temporary_directions_the_bases_need_not_grow(recipe, zoo):
    found = re.findall(LINE, recipe("grow_store", *zoo, "--temporary", 0))
    assert [(before, after, k) for _, _, before, after, k in found] == [("100.0", "100.0", "4")] * 2


def test_within_a_bound_the_loss_is_said(recipe, zoo):
    printed = recipe("grow_store", *zoo, "--max_components", 5)
    assert "none changed by a bit" not in printed
    assert re.search(r"largest loss of the 4 old members [\d.]+%", printed)
