"""The audit command prints what the library measures, and writes figure and page whole."""

import json
import re
import shlex
from importlib.util import find_spec
from statistics import fmean

import pytest
import torch
from transformers import BertModel

from eigenpeft import AdapterStore
from eigenpeft.cli.tasks import load_new_task, load_task
from eigenpeft.recycling.training import judge
from eigenpeft.report import plots
from tests.factories import make_collection, random_factors, tiny_bert, tiny_llama, write_adapter
from tests.recipes.tiny import tiny_tokenizer


def test_audit_says_it_in_words_and_in_json(run, adapters, tmp_path):
    shown = run("audit", adapters.folder, "-k", 8)
    assert shown.code == 0
    assert "held out" in shown.out
    for word in ("Compress:", "Train:", "Reuse:", "A detail, how much the adapters share: shared."):
        assert word in shown.out
    report = json.loads(run("audit", adapters.folder, "-k", 8, "--json").out)
    assert report["verdict"] == "shared"
    assert report["compress"]["answer"] in ("yes", "no")
    assert report["train"]["answer"] == "unknown"  # the calibration has no adapters of this base model
    assert report["reuse"]["answer"] == "not asked"
    assert set(report["modules"]) == set(adapters.components_in)
    assert report["sharing"] is None


def test_audit_says_what_shared_banks_cost(run, adapters, tmp_path):
    shown = run("audit", adapters.folder, "-k", 8, "--share", "layers")
    assert shown.code == 0
    assert "of ‖ΔW‖² is what sharing costs" in " ".join(shown.out.split())
    report = json.loads(run("audit", adapters.folder, "-k", 8, "--share", "layers", "--json").out)
    assert report["sharing"]["n_banks"] < report["sharing"]["n_modules"]


def test_audit_draws(run, adapters, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    result = run(
        "audit",
        adapters.folder,
        *("-k", 8, "--share", "layers"),
        *("--plot", tmp_path / "a.png", "--html", tmp_path / "deep" / "a.html"),
    )
    assert result.code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "deep" / "a.html").read_text()
    assert "data:image/png;base64," in page
    assert "adapter-3" in page
    assert "Banks that layers share" in page
    assert "http" not in page.replace("http-equiv", "")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.html"]
    monkeypatch.setattr(plots, "Figure", None)
    refused = run("audit", adapters.folder, "-k", 8, "--plot", tmp_path / "b.png")
    assert refused.code == 1
    assert "pip install 'eigenpeft[plots]'" in refused.err


def test_audit_refuses(run, adapters, tmp_path):
    result = run("audit", adapters.folder / "adapter-0", "-k", 4)
    assert result.code == 1
    assert "at least 3" in result.err


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def language_model(tmp_path):
    """A tiny Llama and its tokenizer on disk."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def language_adapters(tmp_path):
    modules = {f"model.layers.{i}.self_attn.v_proj": (8, 16) for i in (0, 1)}
    return make_collection(tmp_path / "language", modules=modules, rank=2, n_shared=4, noise=0.1)


ROWS = {
    "text": {"text": "w1 w2 w3 w4"},
    "completion": {"prompt": "w1 w2", "completion": " w3 w4"},
    "messages": {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
}


@pytest.mark.parametrize("kind", ROWS)
def test_audit_with_a_new_task(run, language_adapters, language_model, tmp_path, kind):
    data = written(tmp_path / "task.jsonl", [ROWS[kind]] * 5)
    arguments = ("audit", language_adapters.folder, "-k", 4, "--model", language_model, "--dataset", data)
    page = ("--html", tmp_path / "a.html") if find_spec("matplotlib") else ()  # of the extra plots
    shown = run(*arguments, "--n-rows", 4, *page)
    assert shown.code == 0, shown.err
    assert "Share of the new task's gradient, 2 modules, 1 batches" in shown.out
    assert "Of the new task's gradient, before any training" in " ".join(shown.out.split())
    if page:
        assert "core diagonal" in page[1].read_text()
    report = json.loads(run(*arguments, "--json").out)
    assert 0 < report["gradient"]["share"] < report["gradient"]["optimum"] <= 1


@pytest.fixture
def classifier(tmp_path):
    """A tiny BERT with a head of three labels and its tokenizer on disk."""
    tiny_bert().save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_audit_with_a_new_classification_task(run, classifier, tmp_path):
    modules = {f"bert.encoder.layer.{i}.attention.self.value": (16, 16) for i in (0, 1)}
    adapters = make_collection(
        tmp_path / "sources", modules=modules, rank=2, n_shared=4, noise=0.1, task_type="SEQ_CLS"
    )
    start = ("audit", adapters.folder, "-k", 4, "--model", classifier, "--json")
    rows = [{"text": "w1 w2", "label": 0}, {"text": "w3 w4 w5", "label": "LABEL_2"}]
    report = run(*start, "--dataset", written(tmp_path / "numbers.jsonl", rows[:1] * 9))
    names = run(*start, "--dataset", written(tmp_path / "names.jsonl", rows[1:] * 9))
    for ran in (report, names):
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["gradient"]["n_batches"] == 2
    unknown = run(*start, "--dataset", written(tmp_path / "unknown.jsonl", [{"text": "w1", "label": 7}]))
    assert (unknown.code, "has the label 7; the classifier knows" in unknown.err) == (1, True)
    absent = run(*start, "--dataset", tmp_path / "absent.jsonl")
    assert (absent.code, "There is no file or folder" in absent.err) == (1, True)


def test_a_base_without_a_head_gets_one_that_is_trained_on_the_rows(run, tmp_path):
    BertModel(tiny_bert().config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    modules = {f"bert.encoder.layer.{i}.attention.self.value": (16, 16) for i in (0, 1)}
    adapters = make_collection(tmp_path / "sources", modules=modules, rank=2, n_shared=4, task_type="SEQ_CLS")
    rows = [{"text": "w1 w2", "label": "yes"}, {"text": "w3 w4 w5", "label": "no"}] * 8
    data = written(tmp_path / "task.jsonl", rows)
    start = ("audit", adapters.folder, "-k", 4, "--model", tmp_path / "base", "--dataset", data)
    refused = run(*start)
    assert (refused.code, "Add --train-head" in refused.err) == (1, True)
    shown = run(*start, "--train-head")
    assert shown.code == 0, shown.err
    assert "once in 20 draws" in " ".join(shown.out.split())
    task = load_task(str(tmp_path / "base"), data, n_rows=16, train_head=True)
    fresh = load_new_task(str(tmp_path / "base"), data)
    torch.manual_seed(0)
    losses = [
        fmean(judge(each, fresh.rows, data_collator=fresh.data_collator)[1])
        for each in (fresh.make_model(), task.model)
    ]
    assert losses[1] < losses[0] - 0.05
    trained, untouched = task.model.state_dict(), fresh.make_model().state_dict()
    assert all(torch.equal(trained[name], value) for name, value in untouched.items() if name.startswith("bert."))


def test_audit_refuses_a_task_it_cannot_read(run, language_adapters, language_model, tmp_path):
    start = ("audit", language_adapters.folder, "-k", 4, "--model", language_model)
    other = run(*start, "--dataset", written(tmp_path / "a.jsonl", [{"question": "one"}]))
    assert (other.code, "has the columns ['question']" in other.err) == (1, True)
    labelled = run(*start, "--dataset", written(tmp_path / "b.jsonl", [{"text": "one", "label": 1}]))
    assert (labelled.code, "no trained classifier" in labelled.err) == (1, True)
    assert "Add --train-head" in labelled.err
    beside = run(*start, "--train-head", "--dataset", written(tmp_path / "c.jsonl", [ROWS["text"]]))
    assert (beside.code, "--train-head is for rows with text and label" in beside.err) == (1, True)
    without = run("audit", language_adapters.folder, "-k", 4, "--train-head")
    assert (without.code, "--train-head goes with --model and --dataset" in without.err) == (1, True)
    alone = run(*start)
    assert (alone.code, "Pass both --model and --dataset" in alone.err) == (1, True)


@pytest.mark.parametrize("method", ["-k", "--method paired -k"])
def test_the_commands_of_the_compress_answer_do_what_it_says(run, tmp_path, monkeypatch, method):
    """Typed as printed, they make a store of the size and the error that were printed."""
    monkeypatch.chdir(tmp_path)
    modules = {"layer.0.query": (60, 80), "layer.1.query": (60, 80)}
    if method == "-k":
        make_collection(tmp_path / "adapters", n_adapters=20, modules=modules, n_shared=6, rank=8, noise=0.01)
    else:
        pairs = random_factors(modules=modules, rank=8, seed=0)
        for i in range(20):
            generator = torch.Generator().manual_seed(i + 1)
            own = {name: (left * torch.randn(8, generator=generator), right) for name, (left, right) in pairs.items()}
            write_adapter(tmp_path / "adapters" / f"adapter-{i}", own)
    told = " ".join(run("audit", "adapters", "-k", 32).out.split())
    build, add = re.findall(r"`(eigenpeft (?:build|store add) [^`]*)`", told)
    assert re.fullmatch(rf"eigenpeft build adapters {method} \d+ --out subspace", build)
    for command in (build, add):
        assert run(*shlex.split(command)[1:]).code == 0
    written, original = (float(each) for each in re.findall(r"writes ([\d]+) kB for ([\d]+) kB", told)[0])
    store = AdapterStore.from_pretrained("store")
    bases = sum(bank.components_in.numel() + bank.components_out.numel() for bank in store.subspace.values())
    assert (4 * bases + sum(store[name].n_bytes for name in store.names)) / 1000 == pytest.approx(written, abs=1)
    assert original == pytest.approx(4e-3 * 20 * 2 * 8 * (60 + 80), abs=1)
    kept = fmean(1 - error**2 for errors in store.relative_errors.values() for error in errors.values())
    said = float(re.findall(r"keeps ([\d.]+)% of ‖ΔW‖²", told)[0])
    assert (
        100 * kept > said - 0.2
    )  # paired directions are fitted quickly by the audit: the build finds at least as much
    assert method != "-k" or 100 * kept == pytest.approx(said, abs=0.2)
