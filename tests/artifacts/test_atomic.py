"""Folders appear whole or not at all."""

import os

import pytest

from eigenpeft.artifacts.atomic import atomic_folder
from eigenpeft.errors import ArtifactError


def write(path, *, last="config.json", content="new"):
    with atomic_folder(path, last=last) as scratch:
        (scratch / "data").write_text(content)
        (scratch / last).write_text(content)


def files(path):
    return {file.name: file.read_text() for file in path.iterdir()}


def test_new_folder_appears_whole_and_with_usual_permissions(tmp_path):
    write(tmp_path / "a" / "b")
    (tmp_path / "a" / "plain").mkdir()
    assert files(tmp_path / "a" / "b") == {"data": "new", "config.json": "new"}
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "a" / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_interrupted(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "out", last="config.json") as scratch:
        (scratch / "data").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_update_leaves_the_old_files(tmp_path):
    write(tmp_path / "out", content="old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out", last="config.json") as scratch:
        (scratch / "data").write_text("half")
        raise RuntimeError
    assert files(tmp_path / "out") == {"data": "old", "config.json": "old"}


def test_update_replaces_its_files_and_keeps_others(tmp_path):
    write(tmp_path / "out", content="old")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    write(tmp_path / "out")
    assert files(tmp_path / "out") == {"data": "new", "config.json": "new", "notes.txt": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ArtifactError, match="a file of that name is in the way"):
        write(tmp_path / "out")


@pytest.mark.parametrize("parent", ["/proc/eigenpeft", "/dev/null/eigenpeft"])
def test_a_place_that_cannot_be_written_is_one_error(parent):
    with pytest.raises(ArtifactError, match="Choose a folder you may write to"):
        write(f"{parent}/out")


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(ArtifactError, match="No space left on device.*free some space"),
        atomic_folder(tmp_path / "out", last="config.json") as scratch,
    ):
        (scratch / "data").write_text("half")
        raise OSError(28, os.strerror(28))
    assert list(tmp_path.iterdir()) == []
