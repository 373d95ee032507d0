"""Rows and models that commands open: what is wrong with their names."""

import warnings

import pytest
from datasets import Dataset

from eigenpeft.cli.rows import open_tokenizer, without_load_reports
from eigenpeft.cli.tasks import Columns, open_task
from eigenpeft.errors import EigenPeftError


def test_a_base_model_that_is_nowhere_is_named():
    with pytest.raises(
        EigenPeftError, match=r"The base model 'no-such-model' cannot be loaded \(.+\)\. Pass its folder.* as --model"
    ):
        open_tokenizer("no-such-model")


def test_other_warnings_are_not_hidden_with_the_one_that_is_expected():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with without_load_reports():
            warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
            warnings.warn("`something` is deprecated", FutureWarning, stacklevel=1)
    assert [str(each.message) for each in seen] == ["`something` is deprecated"]


@pytest.mark.parametrize(
    ("columns", "row", "kind"),
    [
        (Columns(), {"text": "a", "label": 1, "id": 7}, "a classifier, by the columns text, label (not used: id)"),
        (Columns(), {"text": "a", "category": "x"}, "a language model, by the columns text (not used: category)"),
        (
            Columns("body", "kind"),
            {"text": "b", "body": "a", "kind": 1, "label": 2},
            "a classifier, by the columns body, kind",
        ),
        (Columns("label", "text"), {"text": 1, "label": "a"}, "a classifier, by the columns label, text"),
        (Columns(), {"prompt": "a", "completion": "b"}, "a language model, by the columns prompt, completion"),
    ],
)
def test_the_kind_of_task_is_said(tmp_path, columns, row, kind):
    Dataset.from_list([row]).to_json(tmp_path / "rows.jsonl")
    table, said = open_task(tmp_path / "rows.jsonl", columns=columns)
    assert said.startswith(kind)
    if kind.startswith("a classifier"):
        assert (table[0]["text"], table[0]["label"]) == ("a", 1)


def test_two_columns_are_two(tmp_path):
    Dataset.from_list([{"text": "a"}]).to_json(tmp_path / "rows.jsonl")
    with pytest.raises(EigenPeftError, match="both name 'text'"):
        open_task(tmp_path / "rows.jsonl", columns=Columns("text", "text"))
