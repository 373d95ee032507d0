"""Files of comparisons with ordinary damage: one message each, which names the row where there is one."""

import json

import pytest
import torch

from eigenpeft.cli.rows import open_rows
from eigenpeft.cli.training.comparisons import read_comparisons
from eigenpeft.errors import EigenPeftError


def rows():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "chosen": torch.randn(8, generator=generator).tolist(),
            "rejected": torch.randn(8, generator=generator).tolist(),
            "user_id": f"u{i % 4}",
        }
        for i in range(20)
    ]


def lines(table):
    return "\n".join(map(json.dumps, table)).encode()


def changed(**change):
    table = rows()
    table[3] |= change
    return lines(table)


DAMAGES = {
    "empty": ("a.jsonl", b"", "is empty"),
    "blank": ("b.jsonl", b"\n\n", "cannot be read as jsonl|has no rows"),
    "not JSON": ("c.jsonl", b"hello", "cannot be read as jsonl"),
    "cut": ("d.jsonl", lines(rows())[:-20], "cannot be read as jsonl|Row 19"),
    "another length": ("e.jsonl", changed(chosen=[1.0]), "Row 3 of .* has 1 numbers in its column 'chosen'"),
    "text among numbers": ("f.jsonl", changed(chosen="x"), "cannot be read as jsonl|Row 3"),
    "null": ("g.jsonl", changed(chosen=None), "Row 3 of .* has None in its column 'chosen'"),
    "null among numbers": ("h.jsonl", changed(rejected=[1.0, None] * 4), "Row 3 of .* in its column 'rejected'"),
    "no user": ("i.jsonl", changed(user_id=None), "Row 3 of .* has no user in its column 'user_id'"),
    "an empty user": ("j.jsonl", changed(user_id=""), "Row 3 of .* has no user in its column 'user_id'"),
    "not UTF-8": (
        "k.jsonl",
        b'{"chosen": "\xff", "rejected": "a", "user_id": "u"}',
        "is not UTF-8 text .* near byte 12",
    ),
    "deep": ("l.jsonl", b'{"chosen": ' + b"[" * 2000 + b"]" * 2000 + b"}", "cannot be read as jsonl|has no column"),
    "no Parquet": ("m.parquet", b"PAR1" + bytes(99), "cannot be read as parquet"),
    "no table": ("n.csv", b"\x00\x01\x02,\n,,,,\n", "cannot be read as csv|has no column|has no rows"),
}


# An old reader of datasets leaves the file that it refuses open.
@pytest.mark.filterwarnings(
    "ignore:.*unclosed file:pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file:ResourceWarning"
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_message(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    name, content, message = DAMAGES[damage]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EigenPeftError, match=message):
        read_comparisons(tmp_path / name, user_column="user_id", cache=None)


def test_a_name_is_no_pattern(tmp_path):
    (tmp_path / "data[1].jsonl").write_bytes(lines(rows()))
    assert len(open_rows(tmp_path / "data[1].jsonl")) == 20


def test_a_folder_that_datasets_did_not_save_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EigenPeftError, match="is not a folder saved by datasets"):
        open_rows(tmp_path)
