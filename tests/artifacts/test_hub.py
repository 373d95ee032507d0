"""To the Hub and back over HTTP, against a stand-in on this machine: nothing leaves it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from eigenpeft import PrincipalSubspace
from tests.factories import make_collection, tiny_llama
from tests.hub import COMMIT, local_hub

pytestmark = pytest.mark.slow


@pytest.fixture
def hub():
    with local_hub() as running:
        yield running


@pytest.fixture
def eigenpeft(hub, tmp_path):
    """The command line in a process that talks to the stand-in."""

    def call(*words, code=0):
        settings = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_stand_in"}
        settings |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-m", "eigenpeft", *map(str, words)]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=900)
        assert done.returncode == code, done.stderr
        return done

    return call


def test_a_subspace_goes_up_with_its_card_and_comes_back_the_same(hub, eigenpeft, tmp_path):
    make_collection(tmp_path / "adapters", n_adapters=4, rank=(4, 4))
    eigenpeft("build", tmp_path / "adapters", "-k", 4, "--out", tmp_path / "subspace")
    assert "owner/recycled" in eigenpeft("push", tmp_path / "subspace", "owner/recycled").stdout
    uploaded = hub.files["owner/recycled"]
    assert set(uploaded) >= {"README.md", "subspace.safetensors", "subspace_config.json"}
    assert uploaded["subspace.safetensors"] == (tmp_path / "subspace" / "subspace.safetensors").read_bytes()
    assert "library_name: eigenpeft" in uploaded["README.md"].decode()
    assert hub.tokens == {"Bearer hf_stand_in"}
    there = json.loads(eigenpeft("inspect", "owner/recycled", "--json").stdout)
    here = json.loads(eigenpeft("inspect", tmp_path / "subspace", "--json").stdout)
    assert there["modules"] == here["modules"]
    assert COMMIT in str(list((tmp_path / "home").rglob("*")))


def test_adapters_are_read_from_repositories(hub, eigenpeft, tmp_path):
    for i in range(3):
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(i))
        model.save_pretrained(tmp_path / f"adapter-{i}")
        files = [path for path in (tmp_path / f"adapter-{i}").iterdir() if path.is_file()]
        hub.files[f"owner/adapter-{i}"] = {path.name: path.read_bytes() for path in files}
    ids = [f"owner/adapter-{i}" for i in range(3)]
    eigenpeft("build", *ids, "-k", 3, "--out", tmp_path / "subspace")
    sources = PrincipalSubspace.from_pretrained(tmp_path / "subspace").info.sources
    assert [(source["source"], source["revision"]) for source in sources] == [(name, COMMIT) for name in ids]


def test_what_is_not_there_is_one_message(eigenpeft):
    done = eigenpeft("inspect", "owner/nothing", code=1)
    assert "owner/nothing" in done.stderr
    assert "Traceback" not in done.stderr
