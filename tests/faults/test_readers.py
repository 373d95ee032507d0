"""Every file of tensors is opened by the one reader that checks it first and never maps it."""

import os
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import eigenpeft
from eigenpeft.artifacts.tensor_file import read_tensors
from eigenpeft.building.work_folder import Shards
from eigenpeft.combining.heads import HEAD_FILE, HEADS_FOLDER, load_head
from eigenpeft.combining.statistics import CONFIG_NAME, TENSORS_NAME, load_statistics
from eigenpeft.errors import ArtifactError
from eigenpeft.reward.artifact.users import UserTable

SOURCES = Path(eigenpeft.__file__).parent


def test_no_file_is_mapped():
    """`safe_open` and `load_file` map: a file that somebody cuts in place ends the process, and a pipe is waited for."""
    mapping = re.compile(r"\b(safe_open|load_file)\b(?!`)")
    found = [
        f"{path.relative_to(SOURCES)}: {line.strip()}"
        for path in SOURCES.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if mapping.search(line) and "`safetensors.safe_open` gives" not in line
    ]
    assert found == []


def head(path):
    place = path / HEADS_FOLDER / "task"
    place.mkdir(parents=True)
    return place / HEAD_FILE, lambda: load_head(nn.Linear(2, 2), folder=path, name="task")


def statistics(path):
    (path / CONFIG_NAME).write_text("{}")
    return path / TENSORS_NAME, lambda: load_statistics(path)


def users(path):
    return path / "users.safetensors", lambda: UserTable.open(path / "users.safetensors", n_basis=2)


def work(path):
    folder = Shards(path / "work", {"modules": ["a"]})
    return folder._path("a"), lambda: folder.load_tensors("a", names=["x"])


def pipe(path):
    os.mkfifo(path)


def endless(path):
    header = b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def cut(path):
    save_file({"x": torch.ones(100)}, path)
    os.truncate(path, 200)


@pytest.mark.parametrize("damage", [pipe, endless, cut])
@pytest.mark.parametrize("reader", [head, statistics, users, work])
def test_damaged_files_are_one_error_at_once(tmp_path, reader, damage):
    path, read = reader(tmp_path)
    damage(path)
    with pytest.raises(ArtifactError, match=re.escape(path.name)):
        read()


def test_what_was_read_does_not_change_with_its_file(tmp_path):
    save_file({"x": torch.arange(1000.0)}, tmp_path / "file.safetensors", metadata={"a": "b"})
    tensors, metadata = read_tensors(tmp_path / "file.safetensors")
    os.truncate(tmp_path / "file.safetensors", 0)
    assert metadata == {"a": "b"}
    assert torch.equal(tensors["x"], torch.arange(1000.0))
