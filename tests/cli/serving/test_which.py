"""The commands index and which, from rows on disk to a name."""

import json

import pytest

from eigenpeft import AdapterCollection, AdapterStore
from eigenpeft.building import build_subspace
from tests.factories import tiny_bert
from tests.recipes.tiny import tiny_tokenizer


def written(path, texts):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "label": 0}) + "\n" for text in texts))
    return path


@pytest.fixture
def base(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_bert(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_an_index_is_built_and_asked(run, tmp_path, base):
    written(tmp_path / "rows" / "left.jsonl", ["w1 w2 w3", "w2 w3 w1", "w1 w1 w2 w3"] * 4)
    written(tmp_path / "rows" / "right.jsonl", ["w7 w8 w9", "w9 w9 w8", "w8 w7"] * 4)
    built = run("index", tmp_path / "rows", "--model", base, "--out", tmp_path / "index")
    assert built.code == 0, built.err
    assert "Wrote the index of 2 adapters" in built.out
    asked = run("which", written(tmp_path / "task.jsonl", ["w3 w2 w1", "w1 w2"]), "--index", tmp_path / "index")
    assert asked.code == 0, asked.err
    assert "left" in asked.out
    found = json.loads(run("which", tmp_path / "task.jsonl", "--index", tmp_path / "index", "--top-k", 1, "--json").out)
    assert [match["name"] for match in found["matches"]] == ["left"]
    assert 0.0 <= found["probability"] <= 1.0
    assert found["text"].split() == asked.out.split()[-len(found["text"].split()) :] or found["is_far"]


def test_names_must_be_members_and_members_without_rows_are_named(run, tmp_path, base, adapters):
    with AdapterCollection.from_pretrained(adapters.folder) as collection:
        subspace = build_subspace(collection, n_components=4)
        AdapterStore.from_collection(subspace, collection).save_pretrained(tmp_path / "store")
    written(tmp_path / "rows" / "adapter-0.jsonl", ["a b c"])
    arguments = [
        "index",
        tmp_path / "rows",
        "--model",
        base,
        "--store",
        tmp_path / "store",
        "--out",
        tmp_path / "index",
    ]
    shown = run(*arguments)
    assert shown.code == 0, shown.err
    assert "members have no rows and are not in it: adapter-1" in shown.out
    written(tmp_path / "rows" / "adapter-9.jsonl", ["x"])
    refused = run(*arguments, "--overwrite")
    assert refused.code == 1
    assert "not named after a member" in refused.err
    (tmp_path / "rows" / "adapter-9.jsonl").rename(tmp_path / "rows" / "adapter-0.csv")
    assert "are both rows of 'adapter-0'" in run(*arguments, "--overwrite").err


def test_what_is_no_folder_of_rows_is_refused(run, tmp_path, base):
    (tmp_path / "empty").mkdir()
    for place, message in ((tmp_path / "none", "is not a folder"), (tmp_path / "empty", "holds no file that ends in")):
        refused = run("index", place, "--model", base, "--out", tmp_path / "index")
        assert refused.code == 1
        assert message in refused.err.replace("\n", " ")
    refused = run("which", written(tmp_path / "t.jsonl", ["a"]), "--index", tmp_path / "empty", "-n", 0)
    assert refused.code == 1
