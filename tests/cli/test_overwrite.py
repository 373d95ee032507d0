"""Commands replace nothing unless --overwrite says so, and never what eigenpeft did not write."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from eigenpeft import LowRankRewardModel, PrincipalSubspace
from eigenpeft.artifacts import atomic


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def made(run, adapters, tmp_path):
    """A subspace, a store of it and a plain LoRA, by the commands that write them; and those commands with other results."""
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    folder = adapters.folder
    sub, store, lora = (tmp_path / name for name in ("sub", "store", "lora"))
    for command in (
        ("build", folder, "-k", 4, "-o", sub),
        ("project", sub, folder, "-o", store),
        ("export", store, "adapter-1", "-o", lora),
        ("inspect", sub, "--plot", tmp_path / "spectra.png"),
    ):
        assert run(*command).code == 0
    return {
        "build": (("build", folder, "-k", 3, "-o", sub), sub, "a subspace"),
        "project": (("project", sub, folder / "adapter-0", "-o", store), store, "store"),
        "export": (("export", store, "adapter-2", "-o", lora), lora, "a plain LoRA adapter"),
    }


@pytest.mark.parametrize("command", ["build", "project", "export"])
def test_an_output_that_exists_is_replaced_only_with_overwrite(run, made, tmp_path, command):
    words, out, what = made[command]
    before = contents(out)
    ran = run(*words)
    assert ran.code == 1
    assert f"{str(out)!r} already holds" in ran.err.replace("\n", " ")
    assert what in ran.err
    assert "--overwrite" in ran.err
    assert contents(out) == before
    assert run(*words, "--overwrite").code == 0
    assert contents(out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "lora", "spectra.png", "store", "sub"]


@pytest.mark.parametrize("command", ["build", "project", "export"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_folder_of_somebody_else_is_never_written_into(run, made, tmp_path, command, overwrite):
    words, _, _ = made[command]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("# My project")
    ran = run(*words[:-1], tmp_path / "mine", *overwrite)
    assert ran.code == 1
    assert "did not write: README.md" in ran.err
    assert contents(tmp_path / "mine") == {"README.md": b"# My project"}


def test_an_output_inside_an_input_is_refused(run, made, adapters, tmp_path):
    before = contents(tmp_path)
    for words in (
        ("build", adapters.folder, "-k", 4, "-o", adapters.folder / "sub"),
        ("build", adapters.folder, "-k", 4, "-o", adapters.folder),
        ("build", adapters.folder, "-k", 4, "-o", tmp_path / "new", "--work-dir", adapters.folder / "adapter-0"),
        ("project", tmp_path / "sub", adapters.folder, "-o", tmp_path / "sub" / "store"),
        ("export", tmp_path / "store", "adapter-1", "-o", tmp_path / "store" / "lora"),
        ("inspect", tmp_path / "sub", "--plot", tmp_path / "sub" / "README.md", "--overwrite"),
    ):
        ran = run(*words)
        assert ran.code == 1, words
        assert "which is read" in ran.err, (words, ran.err)
    assert contents(tmp_path) == before


def test_the_same_build_again_after_its_result_was_written_finishes(run, adapters, tmp_path, monkeypatch):
    """Killed between the result and the end: the work folder is still there, and the same command clears it."""
    words = ("build", adapters.folder, "-k", 4, "-o", tmp_path / "sub")
    with monkeypatch.context() as patch:
        patch.setattr("eigenpeft.building.work_folder.Shards.remove", lambda self: None)
        assert run(*words).code == 0
    assert (tmp_path / "sub.work").is_dir()
    before = contents(tmp_path / "sub")
    assert run(*words).code == 0
    assert contents(tmp_path / "sub") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "sub"]
    assert len(PrincipalSubspace.from_pretrained(tmp_path / "sub")) == 4


def test_a_classifier_is_exported_whole_or_not_at_all(run, tmp_path, monkeypatch):
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
    )
    LowRankRewardModel(torch.eye(3, 16), backbone=BertForSequenceClassification(config)).save_pretrained(
        tmp_path / "rw"
    )
    assert run("lore", "export", tmp_path / "rw", "-o", tmp_path / "cls").code == 0
    before = contents(tmp_path / "cls")
    assert run("lore", "export", tmp_path / "rw", "-o", tmp_path / "cls").code == 1
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(atomic, "_finish", full)
        ran = run("lore", "export", tmp_path / "rw", "-o", tmp_path / "cls", "--overwrite")
    assert ran.code == 1
    assert "No space left on device" in ran.err
    assert contents(tmp_path / "cls") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cls", "rw"]


@pytest.mark.parametrize("out", [".", "", "/"])
def test_the_current_folder_is_one_message(run, adapters, tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ran = run("build", adapters.folder, "-k", 4, "-o", out)
    assert ran.code == 1
    assert "is the current folder or one above it" in ran.err
    assert list((tmp_path / "here").iterdir()) == []
