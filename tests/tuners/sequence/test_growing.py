"""New classes with every task: on real adapters and texts, and what is refused."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from eigenpeft.artifacts.tensor_file import TensorFile
from eigenpeft.demo import related_adapters
from eigenpeft.demo.assets import banking77, base_model
from eigenpeft.errors import AdapterConfigError, ArtifactError
from eigenpeft.tuners.sequence import GrowingClassifier


@pytest.fixture(scope="module")
def tasks():
    """Adapter to its rows of train and test, each intent with the first adapter that has it."""
    adapters = json.loads((related_adapters() / "RECORD.json").read_text(encoding="utf-8"))["adapters"][:3]
    rows, found, seen = {split: banking77(split) for split in ("train", "test")}, {}, set()
    for adapter in adapters:
        intents = [name for name in adapter["intents"] if name not in seen]
        seen |= set(intents)
        found[adapter["name"]] = {
            split: [row for name in intents for row in [r for r in rows[split] if r["label_name"] == name][:5]]
            for split in rows
        }
    return found


@pytest.fixture(scope="module")
def embed(tasks):
    """Mean of the last layer over the tokens, with an adapter on."""
    tokenizer = AutoTokenizer.from_pretrained(base_model())
    model = None
    for name in tasks:
        if model is None:
            base = AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=8)
            model = PeftModel.from_pretrained(base, related_adapters() / name, adapter_name=name)
        else:
            model.load_adapter(related_adapters() / name, adapter_name=name)
    model.eval()

    @torch.no_grad()
    def features(name, rows):
        model.set_adapter(name)
        words = tokenizer(list(rows), padding=True, truncation=True, max_length=32, return_tensors="pt")
        hidden = model.base_model.model.bert(**words).last_hidden_state
        mask = words["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    return features


def share_right(growing, tasks):
    rows = [row for task in tasks for row in task["test"]]
    found = growing.predict([row["text"] for row in rows])
    return sum(one == row["label_name"] for one, row in zip(found, rows, strict=True)) / len(rows)


@pytest.mark.slow
def test_classes_of_all_tasks_are_told_apart(tasks, embed):
    growing, done = GrowingClassifier(embed), []
    for name, task in tasks.items():
        growing.add(
            name, rows=[row["text"] for row in task["train"]], labels=[row["label_name"] for row in task["train"]]
        )
        done.append(task)
        assert share_right(growing, done) > 0.5  # by chance one in 8, then one in more than 12 and 16
    assert growing.adapters == tuple(tasks)
    assert len(growing.classes) == len({row["label_name"] for task in tasks.values() for row in task["train"]}) > 16
    assert growing.logits(["hello"]).shape == (1, len(growing.classes))


def test_old_classes_are_completed_in_new_spaces():
    turn = {"a": torch.eye(3), "b": torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])}
    rows = {"a": torch.tensor([[1.0, 0, 0], [0, 1, 0]]), "b": torch.tensor([[1.0, 0.2, 0], [0, 0, 1]])}
    made = {}
    for complete in (True, False):
        growing = made[complete] = GrowingClassifier(
            lambda name, given: torch.stack(list(given)) @ turn[name], weight=1.0, complete=complete
        )
        growing.add("a", rows=list(rows["a"]), labels=["x", "y"])
        growing.add("b", rows=list(rows["b"]), labels=["z", "w"])
        assert growing.classes == ("x", "y", "z", "w")
    # Without completion a class of the first task has no part in the second space; with it "x" leans on "z", which is like it.
    with_, without = (made[complete].logits([torch.tensor([1.0, 0, 0])])[0] for complete in (True, False))
    assert float(without[0]) == pytest.approx(1.0)
    assert float(with_[0]) > 1.2
    assert torch.equal(with_[2:], without[2:])


def test_what_does_not_fit_is_refused():
    growing = GrowingClassifier(lambda name, rows: torch.ones(len(rows), 2))
    with pytest.raises(AdapterConfigError, match="no classes yet"):
        growing.logits(["a"])
    growing.add("first", rows=["a"], labels=["x"])
    with pytest.raises(AdapterConfigError, match="class 'x' is there from an earlier task"):
        growing.add("second", rows=["a"], labels=["x"])
    with pytest.raises(AdapterConfigError, match="adapter 'first' is there from an earlier task"):
        growing.add("first", rows=["a"], labels=["y"])
    with pytest.raises(AdapterConfigError, match="2 rows and 1 labels"):
        growing.add("second", rows=["a", "b"], labels=["y"])
    with pytest.raises(AdapterConfigError, match="weight=-1 must be 0 or more"):
        GrowingClassifier(lambda name, rows: torch.ones(1, 2), weight=-1)
    odd = GrowingClassifier(lambda name, rows: torch.ones(2))
    with pytest.raises(AdapterConfigError, match=r"features of shape \(2,\) for 1 rows"):
        odd.add("first", rows=["a"], labels=["x"])
    assert growing.classes == ("x",)


def embed_by_turning(name, rows):
    turns = {"first": torch.eye(4), "second": 2 * torch.eye(4).flip(0), "third": torch.eye(4).roll(1, 0)}
    return torch.stack([torch.eye(4)[row] for row in rows]) @ turns[name]


def two_tasks(**settings):
    growing = GrowingClassifier(embed_by_turning, **settings)
    growing.add("first", rows=[0, 1], labels=["cat", "dog"])
    growing.add("second", rows=[2, 2, 3], labels=["car", "car", 7])
    return growing


@pytest.mark.parametrize("settings", [{}, {"weight": 0.5, "complete": False}])
def test_what_was_saved_goes_on_as_it_was(tmp_path, settings):
    growing = two_tasks(**settings)
    growing.save(tmp_path / "classes.safetensors")
    loaded = GrowingClassifier.load(tmp_path / "classes.safetensors", embed=embed_by_turning)
    assert (loaded.classes, loaded.adapters) == (("cat", "dog", "car", 7), ("first", "second"))
    assert torch.equal(loaded.logits([0, 1, 2, 3]), growing.logits([0, 1, 2, 3]))
    for each in (growing, loaded):
        each.add("third", rows=[3, 0], labels=["bus", "tram"])
    assert torch.equal(loaded.logits([0, 1, 2, 3]), growing.logits([0, 1, 2, 3]))


def test_a_file_is_replaced_only_when_asked(tmp_path):
    growing, path = two_tasks(), tmp_path / "classes.safetensors"
    growing.save(path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="overwrite"):
        two_tasks(weight=0.3).save(path)
    assert path.read_bytes() == before
    growing.save(path, overwrite=True)
    assert path.read_bytes() == before
    named = GrowingClassifier(embed_by_turning)
    named.add("first", rows=[0], labels=[(1, 2)])
    with pytest.raises(ArtifactError, match=r"class \(1, 2\) is a tuple"):
        named.save(path, overwrite=True)
    assert path.read_bytes() == before


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "classes.safetensors"
    with pytest.raises(ArtifactError, match="Name a file that `save` wrote"):
        GrowingClassifier.load(path, embed=embed_by_turning)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ArtifactError, match="not a growing classifier"):
        GrowingClassifier.load(path, embed=embed_by_turning)
    two_tasks().save(path, overwrite=True)
    with TensorFile(path) as file:
        metadata = dict(file.metadata)
    good = load_file(path)
    for name, value in {"owners": torch.tensor([0, 0, 1, 2]), "prototypes.0": good["prototypes.0"] * torch.inf}.items():
        save_file(good | {name: value}, path, metadata=metadata)
        with pytest.raises(ArtifactError, match="does not fit together: 4 classes, 2 adapters"):
            GrowingClassifier.load(path, embed=embed_by_turning)
