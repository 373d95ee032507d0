"""Folders and files appear whole or not at all, and nothing of somebody else is replaced or deleted."""

import json
import os
import signal

import pytest
from safetensors import SafetensorError

from eigenpeft.artifacts import atomic
from eigenpeft.artifacts.atomic import atomic_file, atomic_folder, atomic_update, check_output
from eigenpeft.artifacts.locks import one_writer
from eigenpeft.artifacts.manifest import MANIFEST, not_ours, read_manifest
from eigenpeft.errors import ArtifactError


def write(path, *, kind="thing", content="new", **options):
    with atomic_folder(path, kind=kind, **options) as scratch:
        (scratch / "data").write_text(content)
        (scratch / "config.json").write_text(content)


def files(path):
    return {file.name: file.read_text() for file in path.iterdir() if file.name != MANIFEST}


def names(path):
    return sorted(file.name for file in path.iterdir())


NEW = {"data": "new", "config.json": "new"}
OLD = {"data": "old", "config.json": "old"}


def killed(work):
    """Run `work` in a process of its own, which it ends with kill -9."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "exchange", lambda first, second: False)
    return request.param


def test_new_folder_appears_whole_and_with_usual_permissions(tmp_path):
    write(tmp_path / "a" / "b")
    (tmp_path / "a" / "plain").mkdir()
    (tmp_path / "a" / "plain" / "file").write_text("")
    assert files(tmp_path / "a" / "b") == NEW
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "a" / "plain").stat().st_mode
    assert names(tmp_path / "a") == ["b", "plain"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "out", kind="thing") as scratch:
            (scratch / "data").write_text("new")
            (scratch / "data").chmod(0o600)  # as safetensors and tempfile make them
        with atomic_file(tmp_path / "file") as place:
            place.write_text("new")
            place.chmod(0o600)
    finally:
        os.umask(before)
    for path in (tmp_path / "out" / "data", tmp_path / "out" / MANIFEST, tmp_path / "file"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert files(tmp_path / "out") == NEW


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert files(tmp_path / "disk") == NEW


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_interrupted(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "out", kind="thing") as scratch:
        (scratch / "data").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_an_existing_artifact_is_replaced_only_when_asked(tmp_path, way):
    write(tmp_path / "out", content="old")
    with pytest.raises(
        ArtifactError, match=r"out' already holds a thing; pass overwrite=True \(--overwrite on the command"
    ):
        write(tmp_path / "out")
    assert files(tmp_path / "out") == OLD
    write(tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == NEW
    assert names(tmp_path) == ["out"]
    assert not_ours(tmp_path / "out") == []


def test_writing_the_same_again_changes_nothing_and_needs_no_permission(tmp_path):
    write(tmp_path / "out")
    before = (tmp_path / "out" / "data").stat()
    write(tmp_path / "out")
    assert (tmp_path / "out" / "data").stat().st_ino == before.st_ino
    assert names(tmp_path) == ["out"]


def test_an_interrupted_replacement_leaves_the_old_files(tmp_path):
    write(tmp_path / "out", content="old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out", kind="thing", overwrite=True) as scratch:
        (scratch / "data").write_text("half")
        raise RuntimeError
    assert files(tmp_path / "out") == OLD
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_refused_by_name(tmp_path, overwrite):
    (tmp_path / "project" / "notes").mkdir(parents=True)
    (tmp_path / "project" / "README.md").write_text("# My project")
    (tmp_path / "project" / "notes" / "thesis.txt").write_text("three years")
    with pytest.raises(ArtifactError, match=r"did not write: README.md, notes/thesis.txt. They are never replaced"):
        write(tmp_path / "project", overwrite=overwrite)
    assert (tmp_path / "project" / "notes" / "thesis.txt").read_text() == "three years"
    assert names(tmp_path) == ["project"]


def test_what_was_added_or_changed_in_an_artifact_is_not_lost(tmp_path):
    write(tmp_path / "out", content="old")
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="did not write: thesis.txt"):
        write(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "thesis.txt").unlink()
    (tmp_path / "out" / "data").write_text("trained further")
    with pytest.raises(ArtifactError, match=r"did not write: data \(changed since it was written\)"):
        write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "data").read_text() == "trained further"


def test_another_kind_of_artifact_is_refused(tmp_path):
    write(tmp_path / "out", kind="subspace")
    with pytest.raises(ArtifactError, match="holds a subspace; a store never replaces it"):
        write(tmp_path / "out", kind="store", overwrite=True)


@pytest.mark.parametrize("link", [False, True])
def test_a_manifest_that_names_other_places_proves_nothing(tmp_path, link):
    """A record could be made by anybody; what it names outside the folder is neither read nor deleted."""
    write(tmp_path / "out")
    (tmp_path / "mine").write_text("mine")
    if link:
        (tmp_path / "out" / "data").unlink()
        (tmp_path / "out" / "data").symlink_to(tmp_path / "mine")
    else:
        record = json.loads((tmp_path / "out" / MANIFEST).read_text())
        record["sha256"] |= {"../mine": ["0"], str(tmp_path / "mine"): ["0"]}
        (tmp_path / "out" / MANIFEST).write_text(json.dumps(record))
    if link:
        with pytest.raises(ArtifactError, match="did not write: data"):
            write(tmp_path / "out", content="newer", overwrite=True)
    else:
        write(tmp_path / "out", content="newer", overwrite=True)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format_version": 2}', "[" * 100_000, '{"format_version": 1, "sha256": 3}']
)
def test_a_damaged_manifest_is_no_proof(tmp_path, text):
    write(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match="did not write: config.json, data"):
        write(tmp_path / "out", overwrite=True)


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ArtifactError, match="a file of that name is in the way"):
        write(tmp_path / "out")


@pytest.mark.parametrize("name", ["", ".", "/", "..", "../.."])
def test_the_current_folder_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ArtifactError, match="is the current folder or one above it. Name a new folder"):
        write(name)


def test_an_output_that_touches_an_input_is_refused(tmp_path):
    (tmp_path / "adapters" / "a").mkdir(parents=True)
    inputs = [tmp_path / "adapters", "owner/name"]
    for place in ("adapters", "adapters/a", "adapters/new/deeper", "x/../adapters/b"):
        with pytest.raises(ArtifactError, match="is, holds or lies inside .*adapters', which is read"):
            write(tmp_path / place, inputs=inputs)
    with pytest.raises(ArtifactError, match="which is read"), atomic_file(tmp_path / "adapters" / "f", inputs=inputs):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "adapters")
    with pytest.raises(ArtifactError, match="which is read"):
        write(tmp_path / "link" / "b", inputs=inputs)
    write(tmp_path / "adapters-2", inputs=inputs)


@pytest.mark.parametrize("parent", ["/proc/eigenpeft", "/dev/null/eigenpeft"])
def test_a_place_that_cannot_be_written_is_one_error(parent):
    with pytest.raises(ArtifactError, match="Choose a folder you may write to"):
        write(f"{parent}/out")


@pytest.mark.parametrize(
    "error", [OSError(28, os.strerror(28)), SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, error):
    for writer, options in ((atomic_folder, {"kind": "thing"}), (atomic_file, {})):
        with (
            pytest.raises(ArtifactError, match="No space left on device.*free some space"),
            writer(tmp_path / "out", **options),
        ):
            raise error
    assert names(tmp_path) == []


def test_check_output_refuses_before_the_work(tmp_path):
    check_output(tmp_path / "out", kind="thing")
    write(tmp_path / "out")
    with pytest.raises(ArtifactError, match="already holds a thing"):
        check_output(tmp_path / "out", kind="thing")
    check_output(tmp_path / "out", kind="thing", overwrite=True)
    with pytest.raises(ArtifactError, match="holds a thing; a store never replaces it"):
        check_output(tmp_path / "out", kind="store", overwrite=True)


def test_a_file_is_replaced_only_when_asked(tmp_path):
    with atomic_file(tmp_path / "a" / "page.html") as place:
        place.write_text("old")
    with (
        pytest.raises(ArtifactError, match="already exists; pass overwrite=True"),
        atomic_file(tmp_path / "a/page.html"),
    ):
        pass
    with atomic_file(tmp_path / "a" / "page.html", overwrite=True) as place:
        place.write_text("new")
    assert (tmp_path / "a" / "page.html").read_text() == "new"
    assert names(tmp_path / "a") == ["page.html"]
    with pytest.raises(ArtifactError, match="a folder of that name is in the way"), atomic_file(tmp_path / "a"):
        pass


# Kills: what is there is whole, and the next run leaves nothing beside it.


def test_a_kill_while_writing_leaves_nothing_that_the_next_run_does_not_remove(tmp_path):
    def work():
        with atomic_folder(tmp_path / "out", kind="thing", overwrite=True) as scratch:
            (scratch / "data").write_text("half")
            die()

    killed(work)
    assert not (tmp_path / "out").exists()
    assert names(tmp_path)
    write(tmp_path / "out", content="old")
    assert names(tmp_path) == ["out"]
    killed(work)
    assert files(tmp_path / "out") == OLD
    with pytest.raises(ArtifactError, match="already holds"):
        check_output(tmp_path / "out", kind="thing")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("moment", ["_finish", "_switch", "_fsync", "discard", "exchange"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, way, moment):
    write(tmp_path / "out", content="old")
    with monkeypatch.context() as patch:
        patch.setattr(atomic, moment, die)
        killed(lambda: write(tmp_path / "out", overwrite=True))
    assert files(tmp_path / "out") in (OLD, NEW)
    write(tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == NEW
    assert names(tmp_path) == ["out"]


def test_a_kill_between_two_renames_is_finished_by_the_next_reader_or_writer(tmp_path, monkeypatch):
    write(tmp_path / "out", content="old")
    rename = atomic.Path.rename

    def work():
        monkeypatch.setattr(atomic, "exchange", lambda first, second: False)
        monkeypatch.setattr(
            atomic.Path, "rename", lambda self, to: die() if self.suffix == ".tmp" else rename(self, to)
        )
        write(tmp_path / "out", overwrite=True)

    killed(work)
    assert not (tmp_path / "out").exists()
    check_output(tmp_path / "out", kind="thing", overwrite=True)
    assert files(tmp_path / "out") == NEW
    assert names(tmp_path) == ["out"]


def test_what_somebody_put_into_the_old_folder_meanwhile_is_kept(tmp_path, way):
    write(tmp_path / "out", content="old")
    with atomic_folder(tmp_path / "out", kind="thing", overwrite=True) as scratch:
        (scratch / "data").write_text("new")
        (tmp_path / "out" / "notes").mkdir()
        (tmp_path / "out" / "notes" / "thesis.txt").write_text("mine")
    assert (tmp_path / "out" / "data").read_text() == "new"
    assert (tmp_path / "out" / "notes" / "thesis.txt").read_text() == "mine"
    assert names(tmp_path) == ["out"]


def test_folders_that_only_look_like_scratch_stay(tmp_path):
    for name in (".out.deadbeef.tmp", ".out.deadbeef.old", ".out.tmp", ".other.deadbeef.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    write(tmp_path / "out")
    assert len(list(tmp_path.rglob("thesis.txt"))) == 4


def test_scratch_of_a_living_process_stays(tmp_path):
    """Two writers of one place: the second waits for the lock, and sweeps only when it has it."""
    with atomic_folder(tmp_path / "out", kind="thing") as scratch:
        with (
            pytest.raises(ArtifactError, match="Another process is writing .*out'"),
            one_writer(tmp_path / "out", timeout=0.1),
        ):
            pass
        (scratch / "data").write_text("first")
    assert files(tmp_path / "out") == {"data": "first"}


# Updates inside an artifact.


def update(path, *, removed=(), **contents):
    with one_writer(path), atomic_update(path, last="config.json") as change:
        for name, content in contents.items():
            (change.scratch / name.replace("_", ".")).write_text(content)
        change.removed.extend(removed)


def test_an_update_changes_its_files_and_stays_ours(tmp_path):
    write(tmp_path / "out", content="old")
    update(tmp_path / "out", config_json="new", shard="more", removed=["data"])
    assert files(tmp_path / "out") == {"config.json": "new", "shard": "more"}
    assert not_ours(tmp_path / "out") == []
    assert names(tmp_path) == ["out"]


def test_an_update_does_not_adopt_or_remove_what_is_not_ours(tmp_path):
    write(tmp_path / "out", content="old")
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    update(tmp_path / "out", config_json="new", removed=["thesis.txt"])
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    assert not_ours(tmp_path / "out") == ["thesis.txt"]


@pytest.mark.parametrize("n_renames", range(5))
def test_a_killed_update_stays_ours_and_is_done_again(tmp_path, monkeypatch, n_renames):
    write(tmp_path / "out", content="old")
    replace, done = atomic.Path.replace, []

    def work():
        def dying(self, to):
            if len(done) == n_renames:
                die()
            done.append(to)
            return replace(self, to)

        monkeypatch.setattr(atomic.Path, "replace", dying)
        update(tmp_path / "out", config_json="new", shard="more")
        die()

    killed(work)
    assert not_ours(tmp_path / "out") == []
    update(tmp_path / "out", config_json="new", shard="more")
    assert files(tmp_path / "out") == {"config.json": "new", "data": "old", "shard": "more"}
    assert read_manifest(tmp_path / "out").files.keys() == {"config.json", "data", "shard"}
    assert names(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_read_is_not_replaced(tmp_path, monkeypatch):
    write(tmp_path / "a", content="old")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic, "not_ours", denied)
    with pytest.raises(ArtifactError, match=r"Cannot read '.*a': Permission denied\. Choose another folder"):
        write(tmp_path / "a", overwrite=True)
    assert files(tmp_path / "a") == OLD
