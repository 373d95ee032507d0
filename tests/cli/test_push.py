"""`eigenpeft push`: a dry run shows the card and the files and sends nothing."""

import json

import pytest

from tests.tuners.conftest import random_subspace, tiny_llama


def test_a_dry_run_sends_nothing(run, tmp_path):
    random_subspace(tiny_llama(), ["q_proj"]).save_pretrained(tmp_path / "subspace")
    ran = run("push", tmp_path / "subspace", "me/bases", "--dry-run")
    assert ran.code == 0, ran.err
    assert "Would send README.md, subspace_config.json, subspace.safetensors to me/bases." in ran.out
    answer = json.loads(run("push", tmp_path / "subspace", "me/bases", "--dry-run", "--json").out)
    assert (answer["kind"], answer["url"]) == ("subspace", None)
    assert '"me/bases"' in answer["card"]


def test_a_folder_without_anything_is_one_message(run, tmp_path):
    ran = run("push", tmp_path, "me/bases")
    assert ran.code == 1
    assert "holds no subspace_config.json" in ran.err


def test_an_audit_goes_into_the_card(run, adapters, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    run("build", adapters.folder, "-k", 4, "--out", tmp_path / "subspace")
    (tmp_path / "audit.json").write_text(run("audit", adapters.folder, "-k", 8, "--json").out)
    ran = run("push", tmp_path / "subspace", "me/bases", "--audit", tmp_path / "audit.json", "--dry-run", "--json")
    answer = json.loads(ran.out)
    assert answer["files"][-1] == "audit.png"
    assert "**Compress: may these adapters be kept in fewer numbers?**" in answer["card"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("not json", "cannot be read as JSON"), ("{}", "not a report of this version"), ("[]", "not a report")],
)
def test_an_audit_that_is_none_is_refused(run, tmp_path, text, message):
    random_subspace(tiny_llama(), ["q_proj"]).save_pretrained(tmp_path / "subspace")
    (tmp_path / "audit.json").write_text(text)
    ran = run("push", tmp_path / "subspace", "me/bases", "--audit", tmp_path / "audit.json", "--dry-run")
    assert ran.code == 1
    assert message in ran.err
