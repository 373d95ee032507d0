"""predict: rows of many members in one batch give the logits of the models that were trained, heads included."""

import json

import pytest
import torch
from peft import get_peft_model

from eigenpeft import AdapterStore, EigenLoraConfig, PrincipalSubspace, export_lora
from eigenpeft.collection.formats.labels import label_file, labels_of
from eigenpeft.subspace import SubspaceInfo
from tests.recipes.tiny import tiny_model, tiny_tokenizer
from tests.tuners.conftest import random_subspace, tiny_bert

CORES = {"anna": ("low_rank", 2), "bert": ("full", 3), "carla": ("diagonal", 5)}
TEXTS = ["w1 w2 w3", "w7", "w4 w4 w9 w9"]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def logits_of(model, text):
    tokens = tiny_tokenizer()(text, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits[0]


@pytest.fixture
def place(run, tmp_path, monkeypatch):
    """A base model, a subspace, and a store that the command line made of three adapters, one per core; and their models."""
    monkeypatch.chdir(tmp_path)
    tiny_bert().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    subspace = random_subspace(tiny_bert(), ("query", "value"))
    subspace.save_pretrained("subspace")
    models = {"__base__": tiny_bert()}
    for seed, (name, (core, n_labels)) in enumerate(CORES.items()):
        torch.manual_seed(seed)
        config = EigenLoraConfig(subspace="subspace", core=core, r=4, task_type="SEQ_CLS")
        models[name] = get_peft_model(tiny_bert(n_labels), config).eval()
        for parameter in (p for p in models[name].parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter)
        models[name].save_pretrained(f"adapters/{name}")
    assert run("store", "add", "store", "adapters", "--subspace", "subspace").code == 0
    return models


def test_each_row_gets_its_own_core_and_head(run, place, tmp_path):
    rows = [{"text": text, "member": name} for text in TEXTS for name in place]
    data = written(tmp_path / "rows.jsonl", rows)
    ran = run("predict", "store", data, "--model", "base", "--batch-size", 5, "--out", "found.jsonl", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["rows"]
    assert [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()] == found
    for row, answer in zip(rows, found, strict=True):
        expected = logits_of(place[row["member"]], row["text"])
        assert answer["member"] == row["member"]
        assert answer["label"] == int(expected.argmax())
        torch.testing.assert_close(torch.tensor(answer["logits"]), expected, atol=1e-5, rtol=1e-5)
    shown = run("predict", "store", data, "--model", "base", "--member", "bert").out
    assert "12 rows by 1 members" in shown


def test_a_base_model_without_a_head_answers_for_members_that_have_one(run, place, tmp_path):
    tiny_bert().bert.save_pretrained("encoder")
    tiny_tokenizer().save_pretrained("encoder")
    data = written(tmp_path / "rows.jsonl", [{"text": TEXTS[0]}])
    answer = json.loads(run("predict", "store", data, "--model", "encoder", "--member", "bert", "--json").out)
    torch.testing.assert_close(
        torch.tensor(answer["rows"][0]["logits"]), logits_of(place["bert"], TEXTS[0]), atol=1e-5, rtol=1e-5
    )
    ran = run("predict", "store", data, "--model", "encoder", "--member", "__base__")
    assert ran.code == 1
    assert "'__base__' would answer with the head of the base model, and 'encoder' has no trained head" in ran.err


def test_reward_models_of_a_decoder_give_scores_and_no_label(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("reward").save_pretrained("base")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None  # many decoders have none
    tokenizer.save_pretrained("base")
    random_subspace(tiny_model("reward"), ("q_proj", "v_proj")).save_pretrained("subspace")
    config = EigenLoraConfig(subspace="subspace", r=4, task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(tiny_model("reward"), config).eval()
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained("adapters/judge")
    assert run("store", "add", "store", "adapters", "--subspace", "subspace").code == 0
    data = written(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    ran = run("predict", "store", data, "--model", "base", "--member", "judge", "--json")
    assert ran.code == 0, ran.err
    for text, answer in zip(TEXTS, json.loads(ran.out)["rows"], strict=True):
        assert answer["label"] is None
        torch.testing.assert_close(torch.tensor(answer["logits"]), logits_of(model, text), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"text": "w1"}], (), "none is called member; name one member for all rows with --member"),
        ([{"words": "w1", "member": "anna"}], (), "it must have one called text"),
        ([{"text": "w1", "member": None}, {"text": "w1", "member": "anna"}], (), "Row 0 of"),
        ([{"text": "w1", "member": "ana"}], (), "'ana' is not in the store"),
        ([{"text": "w1"}], ("--member", "anna", "--out", "base/config.json"), "--overwrite"),
    ],
)
def test_bad_input_is_one_message(run, place, tmp_path, rows, arguments, message):
    before = (tmp_path / "base" / "config.json").read_bytes()
    ran = run("predict", "store", written(tmp_path / "rows.jsonl", rows), "--model", "base", *arguments)
    assert ran.code == 1
    assert message in " ".join(ran.err.split())
    assert (tmp_path / "base" / "config.json").read_bytes() == before


def test_a_store_that_does_not_name_its_base_model_asks_for_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    modules = dict(random_subspace(tiny_bert(), ("query",)))
    AdapterStore(PrincipalSubspace(modules, info=SubspaceInfo())).save_pretrained("store")
    ran = run("predict", "store", written(tmp_path / "rows.jsonl", [{"text": "w1"}]), "--member", "anna")
    assert ran.code == 1
    assert "does not name its base model; pass it as --model" in " ".join(ran.err.split())


def test_label_names_go_from_the_training_to_the_prediction(run, place, tmp_path):
    """By each way in which an adapter comes with them; where none does, there is no name."""
    names = {"anna": ["no", "yes"], "bert": ["low", "middle", "high"]}
    place["anna"].config.id2label = dict(enumerate(names["anna"]))
    store = AdapterStore.from_pretrained("store")
    store.add(place["anna"], name="anna", replace=True)  # of a model
    (tmp_path / "adapters" / "bert" / "labels.json").write_bytes(label_file(names["bert"]))
    assert run("store", "add", "store", "adapters/bert", "--replace").code == 0  # of a folder
    export_lora(place["anna"], "anna-lora")
    assert run("store", "add", "store", "anna-lora").code == 0  # of an exported LoRA
    assert run("export", "store", "anna-lora", "--out", "again").code == 0
    assert labels_of(tmp_path / "again") == names["anna"]
    data = written(
        tmp_path / "rows.jsonl",
        [{"text": t, "member": m} for t in TEXTS for m in ("anna", "bert", "carla", "anna-lora")],
    )
    found = json.loads(run("predict", "store", data, "--model", "base", "--json").out)["rows"]
    for row in found:
        known = names.get(row["member"].removesuffix("-lora"))
        assert row["label_name"] == (known[row["label"]] if known else None)
    assert {row["label_name"] for row in found} > {None}
    shown = run("predict", "store", data, "--model", "base").out
    assert f"{found[0]['label']} {found[0]['label_name']}" in " ".join(shown.split())


def test_too_few_label_names_are_said_and_not_used(run, place, tmp_path, caplog):
    (tmp_path / "adapters" / "bert" / "labels.json").write_bytes(
        label_file(["low", "high"])
    )  # its head has three outputs
    assert run("store", "add", "store", "adapters/bert", "--replace").code == 0
    data = written(tmp_path / "rows.jsonl", [{"text": "w1", "member": "bert"}])
    ran = run("predict", "store", data, "--model", "base", "--json")
    assert json.loads(ran.out)["rows"][0]["label_name"] is None
    assert "'bert' has names for 2 labels (low, high) and its head has 3 outputs" in caplog.text


def test_an_adapter_of_a_language_model_is_refused_with_a_way_to_generate(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_subspace(tiny_model(), ("q_proj", "v_proj")).save_pretrained("subspace")
    config = EigenLoraConfig(subspace="subspace", r=4, task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), config).save_pretrained("adapters/writer")
    assert run("store", "add", "store", "adapters", "--subspace", "subspace").code == 0
    data = written(tmp_path / "rows.jsonl", [{"text": "w1"}])
    ran = run("predict", "store", data, "--member", "writer")  # before any model is looked for
    assert ran.code == 1
    told = " ".join(ran.err.split())
    assert "'writer' of 'store': an adapter of a language model (task type CAUSAL_LM)" in told
    assert "AdapterBank" in told
    assert "eigenpeft export store writer --out writer-lora" in told
    assert run("export", "store", "writer", "--out", "writer-lora").code == 0
