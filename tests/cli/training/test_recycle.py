"""The command recycle: a classifier's new task and a language model's, from rows in a file to a plain LoRA."""

import json
import logging
import re
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertTokenizerFast

from tests.factories import make_collection, random_factors, tiny_bert, tiny_llama, write_adapter
from tests.recipes.tiny import tiny_tokenizer

MODULES = {f"bert.encoder.layer.{i}.attention.self.query": (16, 16) for i in (0, 1)}


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def classifier(tmp_path):
    """A tiny BERT with a word tokenizer, and three adapters of it."""
    folder = tmp_path / "bert"
    tiny_bert().save_pretrained(folder)
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(59))])
    )
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    for i in range(3):
        write_adapter(
            tmp_path / "adapters" / f"a{i}", random_factors(modules=MODULES, rank=2, seed=i), task_type="SEQ_CLS"
        )
    return folder, tmp_path / "adapters"


@contextmanager
def noted(name):
    """Records of a library's logger."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def test_a_classifier(run, classifier, tmp_path, capsys):
    model, adapters = classifier
    rows = [{"text": f"w{i % 7} w{i % 5}", "label": ["no", "yes"][i % 2]} for i in range(24)]
    data = written(tmp_path / "task.jsonl", rows)
    arguments = ("recycle", adapters, "--model", model, "--dataset", data, "--out", tmp_path / "out", "-k", 2)
    settings = ("--max-steps", 4, "--batch-size", 4, "--candidate", "lora_r8", "--candidate", "merged_head")
    with noted("transformers") as records:
        shown = run(*arguments, *settings)
    assert shown.code == 0, shown.err
    assert not records  # a head that is new is no news
    assert "2 candidates: 4 short trainings to prepare, 4 trials of" in shown.err
    assert "The first trial took" in shown.err
    report = json.loads(run(*arguments, *settings, "--json").out)
    assert report["n_train"] + report["n_held_out"] == 24
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2, ignore_mismatched_sizes=True)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    lines = re.search(r"```python\n(.+?)```", (tmp_path / "out" / "adapter" / "README.md").read_text(), re.S)
    found: dict = {}
    exec(lines[1], found)
    with torch.no_grad():
        expected = adapted(**found["tokenizer"](["a text"], return_tensors="pt")).logits
    torch.testing.assert_close(found["logits"], expected)
    assert found["labels"] == ["no", "yes"]
    assert capsys.readouterr().out.strip() in found["labels"]


def test_trials_at_chance_are_said_to_be_that(run, classifier, tmp_path):
    model, adapters = classifier
    rows = [{"text": "w1 w2", "label": i % 2} for i in range(16)]  # one text, so that nothing tells the labels apart
    data = written(tmp_path / "task.jsonl", rows)
    arguments = ("recycle", adapters, "--model", model, "--dataset", data, "--out", tmp_path / "out", "-k", 2)
    shown = run(*arguments, "--max-steps", 4, "--candidate", "lora_r8")
    assert shown.code == 0, shown.err
    assert "learnt anything that 4 held-out rows show" in " ".join(shown.out.split())
    assert "Scores on" not in shown.out


def test_a_language_model(run, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    modules = {f"model.layers.{i}.self_attn.v_proj": (8, 16) for i in (0, 1)}
    adapters = make_collection(tmp_path / "adapters", modules=modules, rank=2, n_shared=4, noise=0.1)
    data = written(tmp_path / "task.jsonl", [{"prompt": "w1 w2", "completion": " w3 w4"}] * 12)
    arguments = (
        "recycle",
        adapters.folder,
        "--model",
        tmp_path / "llama",
        "--dataset",
        data,
        "--out",
        tmp_path / "out",
        "-k",
        2,
    )
    chosen = [
        part for name in ("lora_r8", "eigenlora", "merged_head", "nearest_continued") for part in ("--candidate", name)
    ]
    shown = run(*arguments, "--max-steps", 4, "--batch-size", 4, *chosen)
    assert shown.code == 0, shown.err
    assert "Not tried: merged_head" in shown.out  # a language model has no new head
    assert "Scores on 3 held-out rows" in shown.out
    assert "AutoModelForCausalLM" in (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_one_label_alone_is_refused(run, classifier, tmp_path):
    model, adapters = classifier
    data = written(tmp_path / "task.jsonl", [{"text": "w1", "label": "a"}] * 4)
    shown = run("recycle", adapters, "--model", model, "--dataset", data, "--out", tmp_path / "out")
    assert shown.code == 1
    assert "a classifier needs two or more" in shown.err
