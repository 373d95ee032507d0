"""Where adapters are looked for, and what they are called."""

from pathlib import Path

import pytest

from eigenpeft.collection.sources import locate
from tests.collection.conftest import COMMIT
from tests.factories import random_factors, write_adapter


@pytest.fixture
def adapter(tmp_path):
    def make(place):
        return write_adapter(tmp_path / place, random_factors())

    return make


def names(sources, **options):
    found, problems = locate(sources, **options)
    assert problems == []
    return [location.name for location in found]


def problem(sources, **options):
    found, problems = locate(sources, **options)
    assert found == []
    assert len(problems) == 1
    return problems[0]


def test_one_folder_as_string_or_path(adapter):
    folder = adapter("one")
    assert names(str(folder)) == names(folder) == names([folder]) == ["one"]


def test_parent_folder_in_natural_order(adapter, tmp_path):
    for place in ("all/run-10", "all/run-2", "all/run-1", "all/.hidden"):
        adapter(place)
    (tmp_path / "all" / "logs").mkdir()
    (tmp_path / "all" / "notes.txt").write_text("")
    assert names(tmp_path / "all") == ["run-1", "run-2", "run-10"]


def test_an_adapter_with_checkpoints_below_is_one_adapter(adapter, tmp_path):
    adapter("run")
    adapter("run/checkpoint-5")
    assert names(tmp_path / "run") == ["run"]


def test_what_is_named_twice_counts_once(adapter, tmp_path):
    folder = adapter("all/one")
    adapter("all/two")
    assert names([tmp_path / "all", folder, tmp_path / "all" / ".." / "all"]) == ["one", "two"]


def test_namesakes_get_their_parents_name(adapter, tmp_path):
    folders = [adapter("a/last"), adapter("b/last"), adapter("b/best")]
    assert names(folders) == ["a--last", "b--last", "best"]
    folders = [adapter("x/a/last"), *folders]
    assert names(folders) == ["a--last", "a--last-2", "b--last", "best"]


def test_relative_and_home_folders(adapter, tmp_path, monkeypatch):
    adapter("one")
    monkeypatch.chdir(tmp_path / "one")
    assert names(".") == ["one"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/one") == ["one"]


@pytest.mark.parametrize("hostile", ["a\nb", "a\x1b[31mb", "..\\..\\x", "C:x", "...", " "])
def test_hostile_folder_names_become_labels(adapter, hostile):
    (name,) = names(adapter(hostile))
    assert name.isprintable()
    assert not set(name) & set("/\\:")
    assert name.strip(". ") == name != ""


def test_the_result_of_recycle_is_called_after_its_folder(adapter, tmp_path, monkeypatch):
    for place in ("billing", "refunds"):
        folder = adapter(f"{place}/adapter").parent
        (folder / "trials.jsonl").write_text("")
    other = adapter("plain/adapter")
    assert names([tmp_path / "billing", tmp_path / "refunds" / "adapter", other]) == ["billing", "refunds", "adapter"]
    monkeypatch.chdir(tmp_path / "billing")
    assert names(["adapter"]) == names(["."]) == ["billing"]
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "trials.jsonl").write_text("")
    assert "is a run of `eigenpeft recycle` that was not finished" in problem(tmp_path / "stopped")


def test_weights_without_config_are_not_passed_over(adapter, tmp_path):
    (adapter("all/one") / "adapter_config.json").unlink()
    adapter("all/two")
    assert names(tmp_path / "all") == ["one", "two"]


def test_hub_id_from_the_cache(hub):
    cache = hub("owner/some-lora")
    (location,), problems = locate("owner/some-lora", cache_dir=cache, local_files_only=True)
    assert problems == []
    assert (location.name, location.source, location.revision) == ("some-lora", "owner/some-lora", COMMIT)
    assert (location.folder / "adapter_config.json").is_file()


@pytest.mark.parametrize("revision", ["v1.0", COMMIT, "refs/pr/1"])
def test_hub_id_with_revision(hub, revision):
    cache = hub("owner/lora", revision="main" if revision == COMMIT else revision)
    (location,), problems = locate([f"owner/lora@{revision}"], cache_dir=cache, local_files_only=True)
    assert problems == []
    assert (location.source, location.revision) == (f"owner/lora@{revision}", COMMIT)


def test_namesakes_on_the_hub_and_on_disk(hub, adapter):
    hub("ann/lora")
    cache = hub("bob/lora")
    local = adapter("mine/lora")
    assert names(["ann/lora", "bob/lora", local], cache_dir=cache) == ["ann--lora", "bob--lora", "mine--lora"]


def test_what_exists_on_disk_is_taken_from_disk(hub, adapter, tmp_path, monkeypatch):
    cache = hub("owner/lora")
    adapter("owner/lora")
    monkeypatch.chdir(tmp_path)
    (location,), _ = locate("owner/lora", cache_dir=cache)
    assert (location.revision, location.folder) == (None, Path("owner/lora"))


def test_download_asks_for_the_adapters_files_alone(monkeypatch, tmp_path):
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path / COMMIT)

    monkeypatch.setattr("eigenpeft.collection.sources.snapshot_download", download)
    locate("owner/lora@v1", token="secret", cache_dir=tmp_path)
    assert asked["repo_id"] == "owner/lora"
    assert asked["revision"] == "v1"
    assert asked["token"] == "secret"  # noqa: S105
    assert asked["allow_patterns"] == ["adapter_config.json", "adapter_model.*", "README.md"]


@pytest.mark.parametrize("source", ["/no/such/folder", "./missing", "a/b/../c", "../../x", "owner/", "x"])
def test_neither_folder_nor_hub_id(source, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    message = problem(source)
    assert "is neither a local folder nor a Hub id of the form 'owner/name'" in message
    assert source in message


@pytest.mark.parametrize(
    ("source", "message"), [("", "'': an empty name"), ("~no-such-user-at-all/x", "home directory")]
)
def test_names_that_lead_nowhere(source, message):
    assert message in problem([source])


def test_hub_id_that_cannot_be_had(tmp_path):
    message = problem("owner/lora", cache_dir=tmp_path, local_files_only=True)
    assert message.startswith(
        "'owner/lora': is not a local folder, and could not be downloaded from the Hub (LocalEntryNotFound"
    )


def test_folder_without_adapters(tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    write_adapter(tmp_path / "deep" / "deeper" / "one", random_factors())
    assert "neither in itself nor in a folder directly below" in problem(tmp_path / "deep")


def test_a_file_instead_of_its_folder(adapter):
    folder = adapter("one")
    assert f"name the folder that holds adapter_config.json, here '{folder}'" in problem(
        folder / "adapter_model.safetensors"
    )


def test_every_bad_source_is_told(adapter, tmp_path):
    found, problems = locate(["x y", adapter("one"), tmp_path / "nothing"])
    assert [location.name for location in found] == ["one"]
    assert len(problems) == 2
