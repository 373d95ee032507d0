"""The index of a file of records: what no writer writes is refused, with the line's own fault in the message."""

import pytest

from eigenpeft.artifacts.records.index import IndexState, lines_of, read_index
from eigenpeft.errors import ArtifactError

HEAD = {"format": 1, "token": "x"}
ADDED = {"add": "a", "shard": "0" * 16, "start": 0, "size": 5, "sha256": "0" * 64}


def index_with(path, line):
    """An index of one record, then one more line whose hash is right, so that only its content can be at fault."""
    text, state = lines_of([HEAD, ADDED], IndexState())
    # Without a head the line is not applied when it is written, as a writer would.
    more, _ = lines_of([line], IndexState(check=state.check))
    path.write_bytes(text + more)
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (ADDED | {"add": "b", "start": -1}, r"ValueError: a record at \(-1, 5\)"),
        (ADDED | {"add": "b", "size": True}, r"ValueError: a record at \(0, True\)"),
        (ADDED | {"add": 3}, "ValueError: a record without a name, a shard or a hash"),
        (ADDED | {"add": "b", "shard": "../other"}, "ValueError: a record without a name, a shard or a hash"),
        ({"remove": "b"}, "KeyError: 'b'"),
        ({"rename": "b", "to": "c"}, "KeyError: 'b'"),
        ({"rename": "a", "to": "a"}, "ValueError: a second record named 'a'"),
        ({"other": "a"}, "ValueError: a line that is not a change"),
    ],
)
def test_lines_that_no_writer_writes_are_refused(tmp_path, line, message):
    with pytest.raises(ArtifactError, match=message):
        read_index(index_with(tmp_path / "members.index", line))


def test_a_file_cut_before_its_first_line_is_refused(tmp_path):
    (tmp_path / "members.index").write_bytes(b"")
    with pytest.raises(ArtifactError, match="is empty: it lacks its first line. Get a fresh copy of the store"):
        read_index(tmp_path / "members.index")


def test_a_rename_keeps_the_place_and_the_order(tmp_path):
    state = read_index(index_with(tmp_path / "members.index", {"rename": "a", "to": "c"}))
    assert [(name, place.size) for name, place in state.places.items()] == [("c", 5)]
