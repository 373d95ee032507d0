"""`eigenpeft push`: a dry run shows the card and the files and sends nothing."""

import json

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
