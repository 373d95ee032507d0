"""The index names adapters, says how sure it is, comes back from disk alike, and refuses what it cannot use."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eigenpeft.errors import ArtifactError, EigenPeftError
from eigenpeft.indexing import AdapterIndex, BaseModelEncoder, build_index
from eigenpeft.indexing.rows import texts_of
from tests.factories import tiny_bert
from tests.recipes.tiny import tiny_tokenizer

WORDS = ("card", "loan", "rain", "snow", "goal", "match")


def encode(texts):
    """Counts of words, with a large part that all texts have in common."""
    return np.array([[text.split().count(word) for word in WORDS] + [5.0] for text in texts])


def rows_of(words, number, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 100, (number, 6), generator=generator).tolist()
    every = [word for word in WORDS if word not in words]
    return [" ".join(words[n % 2] if n < 70 else every[n % 4] for n in row) for row in drawn]


TASKS = {"bank": ("card", "loan"), "weather": ("rain", "snow"), "sports": ("goal", "match")}


@pytest.fixture
def index():
    return build_index(
        {name: rows_of(words, 32, seed) for seed, (name, words) in enumerate(TASKS.items())}, encoder=encode
    )


def test_held_out_rows_get_the_name_of_their_task(index):
    for seed, (name, words) in enumerate(TASKS.items()):
        answer = index.query(rows_of(words, 8, seed + 100))
        assert answer.names[0] == name
        assert answer.matches[0].score > answer.matches[1].score
        assert answer.probability > 0.9
        assert not answer.is_far
        assert answer.text.startswith(f"Sure: {name}.")


def test_the_probability_is_how_often_the_first_name_is_right():
    """Three tasks that overlap: over many queries of one row, the mean probability is the share that was right."""
    alike = ("card", "rain")
    mixed = {
        name: rows_of(words, 24, seed) + rows_of(alike, 24, seed + 7)
        for seed, (name, words) in enumerate(TASKS.items())
    }
    index = build_index(mixed, encoder=encode)
    said, right = [], []
    for seed, (name, words) in enumerate(TASKS.items()):
        for row in rows_of(words, 40, seed + 50) + rows_of(alike, 40, seed + 70):
            answer = index.query([row])
            said.append(answer.probability)
            right.append(answer.names[0] == name)
    assert 0.3 < np.mean(right) < 0.9
    assert np.mean(said) == pytest.approx(np.mean(right), abs=0.12)
    low, high = (
        np.mean([ok for p, ok in zip(said, right, strict=True) if (p > np.median(said)) == upper]) for upper in (0, 1)
    )
    assert high > low + 0.1


def test_rows_of_no_task_are_called_far(index):
    answer = index.query(["zebra zebra", "yak"] * 4)
    assert answer.is_far
    assert answer.text.startswith("The rows look like none of the tasks in the index; the nearest is")


def test_too_little_to_say_how_sure():
    index = build_index({"a": ["card"], "b": ["rain"]}, encoder=encode)
    answer = index.query(["card loan"])
    assert (answer.names[0], answer.probability, answer.is_far) == ("a", None, False)
    assert "too few tasks or rows" in answer.text
    one = build_index({"a": ["card"]}, encoder=encode)
    assert one.query(["rain"]).names == ("a",)


def test_the_gradients_cosines_stand_beside_the_scores(index):
    answer = index.query(["card loan"], downhill={"bank": 0.25})
    assert [match.downhill for match in answer.matches] == [0.25, None, None]
    assert answer.to_dict()["matches"][0]["downhill"] == 0.25


def test_each_text_of_a_batch_gets_a_member_or_a_weighted_few(index):
    texts = ["card loan", "rain snow rain", "goal"]
    assert index.route(texts) == ["bank", "weather", "sports"]
    few = index.route(texts, top_k=2)
    for name, weights in zip(TASKS, few, strict=True):
        assert max(weights, key=weights.get) == name
        assert sum(weights.values()) == pytest.approx(1.0)
        assert len(weights) == 2
    clean = build_index(
        {name: [" ".join(words), " ".join(words[::-1])] * 8 for name, words in TASKS.items()}, encoder=encode
    )
    assert clean.route(["card zebra rain goal", "card loan"], base_if_far=True) == ["__base__", "bank"]


def test_what_was_saved_answers_alike(index, tmp_path):
    index.save_pretrained(tmp_path / "i")
    again = AdapterIndex.from_pretrained(tmp_path / "i", encoder=encode)
    assert again.names == index.names
    assert again.query(["card rain"]) == index.query(["card rain"])
    again.add("more", rows=["loan loan"])
    with pytest.raises(ArtifactError, match="overwrite"):
        again.save_pretrained(tmp_path / "i")
    again.save_pretrained(tmp_path / "i", overwrite=True)
    again.remove("more")
    assert AdapterIndex.from_pretrained(tmp_path / "i", encoder=encode).names == (*index.names, "more")
    with pytest.raises(KeyError, match="'more' is not in the index of 3 adapters"):
        again.remove("more")


def test_altered_files_are_refused(index, tmp_path):
    index.save_pretrained(tmp_path / "i")
    with pytest.raises(ArtifactError, match="made with an encoder of its user's own, 'encode'; pass it"):
        AdapterIndex.from_pretrained(tmp_path / "i")
    path = tmp_path / "i" / "index.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    for changed, message in (
        ({"000000": tensors["000000"] * 2} | {k: v for k, v in tensors.items() if k != "000000"}, "a file was altered"),
        ({k: v for k, v in tensors.items() if k != "000000"}, "2 tensors for 3 adapters"),
        (tensors | {"000000": tensors["000000"][:, :3].contiguous()}, "unequal width"),
        (tensors | {"000000": tensors["000000"] * float("nan")}, "not finite"),
        (tensors | {"000000": tensors["000000"].float()}, "of another type"),
    ):
        save_file(changed, path)
        with pytest.raises(ArtifactError, match=message):
            AdapterIndex.from_pretrained(tmp_path / "i", encoder=encode)
    path.write_bytes(whole[:-10])
    with pytest.raises(EigenPeftError):
        AdapterIndex.from_pretrained(tmp_path / "i", encoder=encode)
    path.write_bytes(whole)
    config = json.loads((tmp_path / "i" / "index_config.json").read_text())
    for change in (
        {"names": ["a", "a", "b"]},
        {"names": "abc"},
        {"max_rows": 0},
        {"encoder": None},
        {"encoder_is_model": 1},
    ):
        (tmp_path / "i" / "index_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ArtifactError, match="as eigenpeft writes them"):
            AdapterIndex.from_pretrained(tmp_path / "i", encoder=encode)


def test_arguments_that_are_wrong_are_refused(index):
    cases = (
        (lambda: AdapterIndex(encode, max_rows=0), "max_rows=0 must be at least 1"),
        (lambda: AdapterIndex(encode).query(["a"]), "The index has no adapters"),
        (lambda: AdapterIndex(encode).save_pretrained("nowhere"), "The index has no adapters"),
        (lambda: index.add("bank", rows=["a"]), "'bank' is in the index already"),
        (lambda: index.add("__base__", rows=["a"]), "cannot be a name in the index"),
        (lambda: index.add("new", rows=[]), "There are no texts in the rows of 'new'"),
        (lambda: index.query([]), "There are no texts in the rows that are asked about"),
        (lambda: index.route(["a"], top_k=0), "top_k=0 must be at least 1"),
        (lambda: index.query([{"label": 1}]), r"Row 0 has no text: it is \['label'\]"),
        (lambda: index.query([3]), "Row 0 has no text: it is a int"),
        (
            lambda: build_index({"a": ["x"]}, encoder=lambda texts: np.zeros(3)),
            r"gave numbers of shape \(3,\) for the 1 texts",
        ),
    )
    for call, message in cases:
        with pytest.raises(EigenPeftError, match=message):
            call()
    other = AdapterIndex(lambda texts: np.ones((len(texts), 3)))
    other._rows = dict(index._rows)
    with pytest.raises(EigenPeftError, match="gave 3 numbers per text for 'new', and the index has 7"):
        other.add("new", rows=["a"])
    with pytest.raises(EigenPeftError, match="gives 3 numbers per text, and the index has 7"):
        other.query(["a"])


def test_answers_of_rows_are_not_embedded():
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "R"},
    ]
    assert texts_of([{"messages": messages, "text": None}, {"prompt": messages[:1]}]) == ["Q\nR", "Q"]


def test_the_base_models_vectors_are_the_mean_over_the_tokens_alone():
    model, tokenizer = tiny_bert(vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
    texts = ["w1 w2", "w1 w2 w3 w4 w5 w6"]
    together = BaseModelEncoder(model.bert, processing_class=tokenizer, batch_size=2)(texts)
    for text, row in zip(texts, together, strict=True):
        states = model.bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().mean(dim=0)
        torch.testing.assert_close(row.double(), states / states.norm(), atol=1e-5, rtol=0)
    assert torch.allclose(
        BaseModelEncoder(model, processing_class=tokenizer)(texts), together, atol=1e-6
    )  # with a head, by its hidden states
    with pytest.raises(EigenPeftError, match="without hidden states"):
        BaseModelEncoder(_Nothing(model), processing_class=tokenizer)(["a"])


class _Nothing(torch.nn.Module):
    """A model that returns no states."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return ()
