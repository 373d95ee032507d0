"""What stops a lore command says which columns or options to change, and speaks no Python."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, T5Config, T5Model

from eigenpeft import LowRankRewardModel
from eigenpeft.reward import SimulatedUsers

WORDS = "the a joke about cats dogs no yes"
PYTHON = re.compile(
    r"\w=(True|None|['\"])|\w+\(\)|cache_dir|add_user|save_pretrained instead|processing_class|backbone="
)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files of comparisons, an encoder, and models fitted to features and to text."""
    folder = tmp_path_factory.mktemp("lore")
    pairs = SimulatedUsers(12, n_features=6, n_basis=2, seed=0).pairs(12, seed=1)
    rows = zip(pairs.chosen.tolist(), pairs.rejected.tolist(), pairs.user_ids, strict=True)
    write(folder / "features.jsonl", [{"chosen": a, "rejected": b, "user_id": user} for a, b, user in rows])
    words = WORDS.split()
    texts = [
        {"chosen": words[i % 8], "rejected": words[(i + 1 + i % 5) % 8], "user_id": f"user-{i % 3}"} for i in range(24)
    ]
    write(folder / "text.jsonl", texts)
    write(folder / "messages.jsonl", [
        {"chosen": [{"role": "user", "content": "yes"}], "rejected": [{"role": "user", "content": "no"}], "user_id": "a"}
    ])  # fmt: skip
    write(folder / "mixed.jsonl", [texts[0] | {"prompt": "a"}, texts[1] | {"prompt": "a"}])
    write(folder / "ratings.jsonl", [{"user_id": "ada", "joke_id": 3, "rating": 4.5}])
    (folder / "tabs.csv").write_text("user_id\tjoke_id\trating\nada\t3\t4.5\n")
    write(folder / "tied.jsonl", [texts[0], texts[1] | {"rejected": texts[1]["chosen"]}])
    write(folder / "renamed.jsonl", [{"good": "yes", "rejected": "no", "who": "ada"}])
    write(
        folder / "answers.jsonl", [{"completion": "yes", "user_id": "user-1"}, {"completion": "no", "user_id": "eve"}]
    )
    write(
        folder / "empty.jsonl", [{"completion": "yes", "user_id": "user-1"}, {"completion": None, "user_id": "user-1"}]
    )
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(["<pad>", "<unk>", *words])}, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<unk>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name in ("encoder", "other"):
        config = BertConfig(vocab_size=10, max_position_embeddings=16, num_labels=1, initializer_range=0.2, **sizes)
        BertForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def lore(run, made, tmp_path, monkeypatch):
    """`lore("fit", ...)` in a copy of the files; fits a model on features and one on text the first time."""
    for name, data, options in (("f", "features", ()), ("t", "text", ("--model", "encoder"))):
        if not (made / name).exists():
            monkeypatch.chdir(made)
            assert run("lore", "fit", f"{data}.jsonl", "--out", name, "--n-basis", 2, *options).code == 0
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return lambda *arguments: run("lore", *arguments)


@pytest.mark.parametrize(
    ("arguments", "remedies"),
    [
        (("fit", "renamed.jsonl", "--out", "x"), [
            "has the columns 'good', 'rejected', 'who'; comparisons need 'chosen', 'rejected' and the user of each",
            "There is no column 'chosen': rename", "There is no column 'user_id': name the users' column with --user-column.",
        ]),
        (("fit", "renamed.jsonl", "--out", "x", "--user-column", "who"), ["no column 'chosen': rename the columns"]),
        (("evaluate", "ratings.jsonl"), [
            "no column 'chosen' and no column 'rejected': rename", "Ratings have to become comparisons first"
        ]),
        (("evaluate", "tabs.csv"), ["has one column, 'user_id", "separated by '\\t'; separate them by commas."]),
        (("fit", "text.jsonl", "--out", "x", "--prompt-column", "what"), ["no column 'what': --prompt-column must name one"]),
        (("fit", "text.jsonl", "--out", "x"), ["The comparisons are text: name a reward model", "--model."]),
        (("fit", "text.jsonl", "--out", "t", "--model", "encoder"), ["pass --overwrite to replace it"]),
        (("fit", "text.jsonl", "--out", "x", "--model", "other"), ["another model; pass another folder as --cache"]),
        (("fit", "text.jsonl", "--out", "x", "--model", "nowhere/here"), ["The base model 'nowhere/here' cannot be loaded"]),
        (("fit", "messages.jsonl", "--out", "x", "--model", "encoder"), ["has no chat template", "give plain text"]),
        (("fit", "features.jsonl", "--out", "x", "--n-basis", 99), [
            "--n-basis 99 must be from 1 to the number of users, 12 here", "Pass --n-basis 1 for one shared head"
        ]),
        (("fit", "features.jsonl", "--out", "x", "--n-components", 99), ["--n-components 99 must be from 1 to the 6 features"]),
        (("evaluate", "text.jsonl", "--model", "encoder", "--n-basis", "lots"), ["--n-basis 'lots' must be a whole number"]),
        (("add-user", "t", "user-1", "tied.jsonl"), ["Row 1 of ", "has the same in 'chosen' and 'rejected'", "Leave ties out."]),
        (("add-user", "f", "ada", "text.jsonl"), ["has no comparisons of 'ada' in its column 'user_id', which names 3 users"]),
        (("add-user", "f", "user-1", "text.jsonl"), ["was fitted on features and has no backbone", "`eigenpeft lore fit --model`"]),
        (("add-user", "t", "user-1", "features.jsonl"), ["of width 6 do not fit a basis of width 8; embed the texts with"]),
        (("add-user", "encoder", "user-1", "text.jsonl"), ["Pass a folder written by `eigenpeft lore fit`"]),
        (("score", "t", "answers.jsonl"), [
            "'eve' is not among the 3 users", "with `eigenpeft lore add-user`, or score as for everybody with --unknown population."
        ]),
        (("score", "t", "empty.jsonl"), ["Row 1 of 'empty.jsonl' has None in its column 'completion'"]),
        (("score", "f", "answers.jsonl", "--user", "user-1"), ["give rows with a column features, or fit it on text"]),
        (("export", "t", "--user", "eve", "--out", "x"), ["`eigenpeft lore add-user`, or leave out --user for the population's"]),
        (("export", "f", "--out", "x"), ["has no backbone, so that there is no classifier to write"]),
        (("export", "t", "--out", "encoder"), ["holds files that eigenpeft did not write"]),
    ],
)  # fmt: skip
# datasets 4.0 leaves a file open that it cannot read.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_remedy_is_a_column_or_an_option(lore, arguments, remedies):
    told = lore(*arguments)
    assert told.code == 1
    text = " ".join(told.err.split())
    for remedy in remedies:
        assert remedy in text
    assert not PYTHON.search(text.replace("or save_pretrained", ""))


def test_a_prompt_of_another_kind_is_named_with_its_row(lore, tmp_path):
    row = json.loads(Path("messages.jsonl").read_text())
    write(tmp_path / "kinds.jsonl", [row | {"prompt": "a joke"}])
    told = lore("fit", tmp_path / "kinds.jsonl", "--out", "x", "--model", "encoder")
    assert "Row 0 of" in told.err
    assert "has a prompt of text and chosen of messages; both must be text" in " ".join(told.err.split())


def test_a_model_that_is_no_classifier_is_named(lore, tmp_path):
    sizes = {"vocab_size": 10, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    T5Model(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "vitmatte"}))
    told = lore("fit", "text.jsonl", "--out", "x", "--model", tmp_path / "t5")
    assert told.code == 1
    assert "cannot be taken as a reward model or encoder" in told.err


@pytest.mark.parametrize("user", ["https://example.org/people/ada", "a" * 180, "ada@example.org"])
def test_a_user_may_have_any_id(lore, user):
    write(Path("own.jsonl"), [{"chosen": "yes", "rejected": "no"}])
    assert lore("add-user", "t", user, "own.jsonl").code == 0
    assert user in LowRankRewardModel.from_pretrained("t").users
