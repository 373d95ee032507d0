"""The command recycle: a classifier's new task and a language model's, from rows in a file to a plain LoRA."""

import json
import logging
import re
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertTokenizerFast

from eigenpeft.recycling import RecycleReport
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
    with noted("transformers") as records, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        shown = run(*arguments, *settings)
    assert shown.code == 0, shown.err
    assert not [each for each in warned if issubclass(each.category, FutureWarning)]
    assert not records  # a head that is new is no news
    assert (
        "3 adapters: a0, a1, a2. The 24 rows are taken for a classifier of 2 labels, by the columns text, label."
        in shown.err
    )
    assert "2 candidates: 4 short trainings to prepare, 4 trials of" in shown.err
    assert "The first trial took" in shown.err
    report = json.loads(run(*arguments, *settings, "--json").out)
    found = RecycleReport.from_dict(report)
    assert all(map(found.is_ranked, found.trials))
    assert not replace(found, candidates=("lora_r8",)).is_ranked(found.trials[0])  # then it was for λ alone
    assert report["n_train"] + report["n_held_out"] == 24
    size = (tmp_path / "out" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert f"a plain LoRA of rank {report['rank']}, {size / 1e6:.1f} MB" in shown.out
    adapter = tmp_path / "out" / "adapter"
    assert f"eigenpeft store absorb STORE {tmp_path / 'out'}" in " ".join(shown.out.split())
    assert f"`eigenpeft store absorb STORE {adapter}`" in (adapter / "README.md").read_text()
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2, ignore_mismatched_sizes=True)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    lines = re.search(r"```python\n(.+?)```", (tmp_path / "out" / "adapter" / "README.md").read_text(), re.S)
    found: dict = {}
    exec(lines[1], found)
    with torch.no_grad():
        expected = adapted(**found["tokenizer"](["a text"], return_tensors="pt")).logits
    torch.testing.assert_close(found["logits"], expected)
    assert found["labels"] == ["no", "yes"]
    assert json.loads((adapter / "labels.json").read_text()) == {"id2label": {"0": "no", "1": "yes"}}
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
    held = written(
        tmp_path / "test.jsonl", [{"prompt": "w1 w2", "completion": " w4"}, {"prompt": "w1", "completion": " w3"}]
    )
    bad = run(*arguments, "--learning-rate", "lora_r8:2e-4")
    assert (
        bad.code,
        "--learning-rate 'lora_r8:2e-4' must be a candidate and a rate, like lora_r8=2e-4" in bad.err,
    ) == (1, True)
    rates = ("--learning-rate", "eigenlora=0.2", "--learning-rate", "eigenlora=0.02")
    shown = run(*arguments, "--max-steps", 4, "--batch-size", 4, *chosen, *rates, "--test", held)
    assert shown.code == 0, shown.err
    assert "4 candidates: 1 short training to prepare" in shown.err  # λ needs none without a head
    assert "Not tried: merged_head" in shown.out  # a language model has no new head
    assert "Scores on 3 held-out rows" in shown.out
    assert "accuracy" not in shown.out  # of a language model
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (marked,) = [line for line in shown.out.splitlines() if re.match(r" *\* ", line)]
    best = RecycleReport.from_dict(report).decisive
    assert [best.candidate, f"{best.steps}", f"{best.loss:.3f}"] == [marked.split()[i] for i in (1, -3, -2)]
    assert "by the columns prompt, completion." in shown.err
    assert "On 2 test rows, used for nothing else, loss ± standard error over rows: the result" in shown.out
    assert report["tested"][-1]["name"] == "base model"
    assert (report["learning_rates"]["lora_r8"], report["learning_rates"]["eigenlora"]) == ([1e-2, 3e-3], [0.2, 0.02])
    assert {each["learning_rate"] for each in report["trials"] if each["candidate"] == "eigenlora"} <= {0.2, 0.02}
    assert "AutoModelForCausalLM" in (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_one_label_alone_is_refused(run, classifier, tmp_path):
    model, adapters = classifier
    data = written(tmp_path / "task.jsonl", [{"text": "w1", "label": "a"}] * 4)
    shown = run("recycle", adapters, "--model", model, "--dataset", data, "--out", tmp_path / "out")
    assert shown.code == 1
    assert "a classifier needs two or more" in shown.err


def test_rows_of_a_classifier_whose_label_has_another_name_are_not_taken_for_text(run, classifier, tmp_path):
    model, adapters = classifier
    rows = [{"text": f"w{i % 7} w{i % 5}", "category": ["no", "yes"][i % 2]} for i in range(8)]
    data = written(tmp_path / "task.jsonl", rows)
    start = ("recycle", adapters, "--model", model, "--dataset", data, "--out", tmp_path / "out", "-k", 2)
    refused = run(*start)
    assert refused.code == 1
    assert "has the columns ['category', 'text'], and 3 of the 3 adapters are classifiers, such as 'a0'" in refused.err
    assert "Name the column of the labels with --label-column" in refused.err
    assert not (tmp_path / "out").exists()
    wrong = run(*start, "--label-column", "kind")
    assert (wrong.code, "has no column 'kind', which --label-column names" in wrong.err) == (1, True)
    new = written(tmp_path / "test.jsonl", [{"text": "w1", "category": "perhaps"}])
    unknown = run(*start, "--label-column", "category", "--test", new)
    assert (unknown.code, "has the label 'perhaps', which none of the rows has" in unknown.err) == (1, True)
    texts = written(tmp_path / "texts.jsonl", [{"prompt": "w1", "completion": "w2", "category": "no"}])
    other = run(*start, "--label-column", "category", "--test", texts)
    assert (other.code, "of the other kind. Give rows with text and label" in other.err) == (1, True)
    shown = run(*start, "--label-column", "category", "--max-steps", 1, "--candidate", "lora_r8")
    assert shown.code == 0, shown.err
    assert "a classifier of 2 labels, by the columns text, category." in shown.err
    audited = run("audit", adapters, "-k", 2, "--model", model, "--dataset", data)
    assert (audited.code, "3 of the 3 adapters are classifiers" in audited.err) == (1, True)
    merged = run("merge", adapters, "--model", model, "--scale", "1,2", "--dataset", data, "--out", tmp_path / "merged")
    assert (merged.code, "the adapters are classifiers, and the rows have no column 'label'" in merged.err) == (1, True)


def test_the_result_of_recycle_is_an_adapter_by_the_name_of_its_folder(run, classifier, tmp_path):
    model, adapters = classifier
    rows = [{"text": f"w{i % 7} w{i % 5}", "label": i % 2} for i in range(8)]
    data = written(tmp_path / "task.jsonl", rows)
    settings = ("--model", model, "--dataset", data, "-k", 2, "--max-steps", 1, "--candidate", "lora_r8")
    first = run("recycle", adapters, *settings, "--out", tmp_path / "first")
    assert first.code == 0, first.err
    second = run("recycle", tmp_path / "first", *settings, "--out", tmp_path / "second")
    assert second.code == 0, second.err
    assert "1 adapter: first." in second.err
    itself = run("recycle", tmp_path / "first", *settings, "--out", tmp_path / "first", "--overwrite")
    assert (itself.code, "which is read" in itself.err) == (1, True)


def test_a_missing_file_of_rows_is_named_before_anything_is_looked_for_on_the_hub(run, tmp_path, monkeypatch):
    def looked(*_, **__):
        raise AssertionError("looked for on the Hub")

    monkeypatch.setattr("eigenpeft.collection.sources.snapshot_download", looked)
    monkeypatch.setattr("eigenpeft.artifacts.storage.snapshot_download", looked)
    missing = tmp_path / "absent.jsonl"
    settings = ("owner/adapter", "--model", "owner/base", "--dataset")
    for command in (
        ("recycle", *settings, missing, "--out", tmp_path / "out"),
        ("audit", *settings, missing),
        ("merge", "owner/adapter", "--dataset", f"task={missing}", "--out", tmp_path / "out"),
        ("which", missing, "--index", "owner/index"),
    ):
        shown = run(*command)
        assert (shown.code, "There is no file or folder" in shown.err) == (1, True), shown.err
