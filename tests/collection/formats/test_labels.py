"""Names of labels beside an adapter."""

import json

import pytest
from transformers import BertConfig

from eigenpeft.collection.formats.labels import label_file, label_names, labels_of


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (BertConfig(id2label={0: "no", 1: "yes"}), ["no", "yes"]),
        ({"id2label": {"1": "yes", "0": "no"}}, ["no", "yes"]),
        (BertConfig(num_labels=3), None),
        ({"id2label": {"0": "no", "2": "yes"}}, None),
        ({"id2label": {"0": 1}}, None),
        ({"id2label": ["no"]}, None),
        (None, None),
    ],
)
def test_names_are_those_of_the_configuration_in_order(config, names):
    assert label_names(config) == names


def test_they_are_read_from_either_file(tmp_path, caplog):
    assert labels_of(tmp_path) is None
    BertConfig(id2label={0: "a", 1: "b"}).save_pretrained(tmp_path)
    assert labels_of(tmp_path) == ["a", "b"]
    (tmp_path / "labels.json").write_bytes(label_file(["ä", "|"]))
    assert labels_of(tmp_path) == ["ä", "|"]
    assert not caplog.records
    for other in ("{", '["a", "b"]', '{"0": "a", "1": "b"}'):
        (tmp_path / "labels.json").write_text(other)
        assert labels_of(tmp_path) == ["a", "b"]
        assert "does not name labels" in caplog.messages[-1]
        assert 'write {"id2label": {"0": "first"' in caplog.messages[-1]
    assert json.loads(label_file(["x"])) == {"id2label": {"0": "x"}}
