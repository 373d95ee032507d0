"""Record logs: appending, two writers, and processes killed at any moment."""

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from eigenpeft.artifacts.records import log as record_log
from eigenpeft.artifacts.records.log import RecordLog
from eigenpeft.errors import ArtifactError

WRITER = """
import sys
from pathlib import Path
from eigenpeft.artifacts.records.log import RecordLog
log, start = RecordLog(Path(sys.argv[1])), int(sys.argv[2])
print("ready", flush=True)
for number in range(start, start + 10**6):
    log.append(f"record-{number}", bytes(str(number), "ascii") * 200)
    if number % 5 == 4:
        log.compact()
"""


@pytest.fixture
def log(tmp_path):
    return RecordLog.create(tmp_path, [("a", b"first"), ("b", b"second" * 100)])


def test_appended_records_are_read_back_and_nothing_else_is_written(log, tmp_path):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (tmp_path / "members").iterdir()}
    index = (tmp_path / "members.index").read_bytes()
    log.append("c", b"third")
    assert RecordLog(tmp_path).names == log.names == ("a", "b", "c")
    assert [RecordLog(tmp_path).read(name) for name in log.names] == [b"first", b"second" * 100, b"third"]
    assert all((path.stat().st_mtime_ns, path.stat().st_size) == state for path, state in before.items())
    assert (tmp_path / "members.index").read_bytes().startswith(index)
    assert log.files()[-1] == "members.index"


def test_the_line_of_a_stopped_writer_does_not_count(log, tmp_path):
    index = tmp_path / "members.index"
    log.append("c", b"third")
    whole = index.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for kept in range(1, len(last)):
        index.write_bytes(whole[: len(whole) - kept])
        assert RecordLog(tmp_path).names == ("a", "b")
    RecordLog(tmp_path).append("d", b"fourth")
    assert RecordLog(tmp_path).names == ("a", "b", "d")
    assert RecordLog(tmp_path).read("d") == b"fourth"


def test_two_writers_lose_nothing(log, tmp_path):
    logs = [RecordLog(tmp_path), RecordLog(tmp_path)]

    def write(which):
        for number in range(10):
            logs[which].append(f"{which}-{number}", b"x" * 50)
            if number == 5:
                logs[which].compact()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    names = set(RecordLog(tmp_path).names)
    assert names == {"a", "b", *(f"{which}-{number}" for which in range(2) for number in range(10))}
    assert all(RecordLog(tmp_path).read(name) for name in names)
    with pytest.raises(
        ArtifactError, match="'0-1' is in .* already; another process has just added it. Take another name"
    ):
        RecordLog(tmp_path).append("0-1", b"")


def test_a_record_that_another_writer_removed_is_one_message(log, tmp_path):
    RecordLog(tmp_path).remove("a")
    for call in (lambda: log.remove("a"), lambda: log.rename("a", "c")):
        with pytest.raises(KeyError, match="'a' is not in .* any more: another process .* a name that is there: 'b'"):
            call()


def test_a_lock_that_is_held_is_one_error(log, tmp_path, monkeypatch):
    monkeypatch.setattr(record_log, "one_writer", lambda path: original(path, timeout=0.1))
    with original(tmp_path / "members.index"), pytest.raises(ArtifactError, match="Another process is writing"):
        RecordLog(tmp_path).append("c", b"third")
    assert RecordLog(tmp_path).names == ("a", "b")


original = record_log.one_writer


def test_a_full_disk_leaves_everything_as_it_was(log, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_log, "_sync", full)
    for call in (lambda: log.append("c", b"third"), log.compact):
        with pytest.raises(ArtifactError, match=r"No space left on device\. What was there is unchanged"):
            call()
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.undo()
    log.append("c", b"third")
    assert RecordLog(tmp_path).read("c") == b"third"


def test_damage_stops_compact_before_anything_is_deleted(log, tmp_path):
    log.append("c", b"third")
    (tmp_path / "members" / f"{log._state.places['c'].shard}.shard").write_bytes(b"THIRD")
    with pytest.raises(ArtifactError, match="'c' in .* are not those that were written"):
        log.compact()
    assert RecordLog(tmp_path).read("a") == b"first"
    assert len(list((tmp_path / "members").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_killed_at_random_moments_every_earlier_record_is_intact(log, tmp_path):
    generator, done = random.Random(0), 0
    for _ in range(12):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(done)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "ready"
            time.sleep(generator.uniform(0.01, 0.3))
            process.kill()
        opened = RecordLog(tmp_path)
        assert opened.names == ("a", "b", *(f"record-{number}" for number in range(len(opened) - 2)))
        assert len(opened) - 2 >= done
        assert opened.read("b") == b"second" * 100
        for number in range(len(opened) - 2):
            assert opened.read(f"record-{number}") == bytes(str(number), "ascii") * 200
        done = len(opened) - 2
    opened.compact()
    assert done > 0
    assert len(list((tmp_path / "members").iterdir())) == 1  # nothing of the killed ones is left


def test_a_name_that_is_taken_stays_with_its_record(log):
    with pytest.raises(ArtifactError, match="'b' is in .* already; choose another name"):
        log.rename("a", "b")
    assert [log.read(name) for name in ("a", "b")] == [b"first", b"second" * 100]
