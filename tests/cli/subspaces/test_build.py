"""build, inspect, project, export: what they write is what the library writes, and --json is JSON alone."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from eigenpeft import AdapterCollection, AdapterStore, PrincipalSubspace, SubspaceBuilder
from eigenpeft.cli.subspaces import build
from eigenpeft.version import __version__
from tests.factories import make_collection


def test_version_and_help(run):
    assert run("--version").out.strip() == __version__
    shown = run("--help").out
    assert all(command in shown for command in ("build", "inspect", "project", "export", "demo"))
    assert "Example: eigenpeft build" in run("build", "--help").out


def test_build_writes_what_the_builder_makes(run, adapters, tmp_path):
    result = run("build", adapters.folder, "-k", 5, "--method", "hosvd", "--seed", 3, "-o", tmp_path / "subspace")
    assert result.code == 0
    assert "Explained share" in result.out
    expected = (
        SubspaceBuilder(5, method="hosvd", seed=3).fit(AdapterCollection.from_pretrained(adapters.folder)).subspace_
    )
    assert PrincipalSubspace.from_pretrained(tmp_path / "subspace").fingerprint == expected.fingerprint


def test_build_takes_a_share_pseudo_components_and_exclusions(run, adapters, tmp_path):
    result = run(
        *("build", adapters.folder, "-k", "0.5", "--n-pseudo-components", 2, "--exclude", "adapter-1"),
        *("-o", tmp_path / "subspace", "--json"),
    )
    summary = json.loads(result.out)
    assert summary["n_adapters"] == 4
    assert summary["n_pseudo_components"] == 2
    assert all(module["explained_share"] >= 0.5 for module in summary["modules"].values())


def test_build_names_the_base_model_that_configs_call_a_folder(run, adapters, tmp_path):
    for file in sorted(adapters.folder.rglob("adapter_config.json")):
        config = json.loads(file.read_text()) | {"base_model_name_or_path": f"/home/{file.parent.name}/base"}
        file.write_text(json.dumps(config))
    assert "base model" in run("build", adapters.folder, "-o", tmp_path / "subspace").err
    assert run("build", adapters.folder, "--model", "owner/base", "-o", tmp_path / "subspace").code == 0
    assert PrincipalSubspace.from_pretrained(tmp_path / "subspace").info.base_model_name_or_path == "owner/base"


def test_project_and_audit_leave_adapters_out(run, adapters, tmp_path):
    run("build", adapters.folder, "-k", 5, "-o", tmp_path / "subspace")
    run("project", tmp_path / "subspace", adapters.folder, "--exclude", "adapter-1", "-o", tmp_path / "store")
    assert AdapterStore.from_pretrained(tmp_path / "store").names == (
        "adapter-0",
        "adapter-2",
        "adapter-3",
        "adapter-4",
    )
    report = json.loads(run("audit", adapters.folder, "-k", 3, "--exclude", "adapter-1", "--json").out)
    assert "adapter-1" not in report["adapters"]
    assert len(report["adapters"]) == 4


def test_build_takes_numbers_by_module(run, adapters, tmp_path):
    result = run("build", adapters.folder, "-k", "*.query=3", "-k", "*=5", "-o", tmp_path / "subspace", "--json")
    counts = {name: module["n_components"] for name, module in json.loads(result.out)["modules"].items()}
    assert counts == {"layer.0.query": 3, "layer.0.value": 5, "layer.1.query": 3, "layer.1.value": 5}


def test_inspect_shows_every_module_and_draws(run, adapters, tmp_path):
    run("build", adapters.folder, "-k", 5, "-o", tmp_path / "subspace")
    shown = run("inspect", tmp_path / "subspace").out
    assert all(module in shown for module in ("layer.0.query", "layer.1.value"))
    summary = json.loads(run("inspect", tmp_path / "subspace", "--json").out)
    assert summary["modules"]["layer.0.query"]["n_components"] == 5
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    assert run("inspect", tmp_path / "subspace", "--plot", tmp_path / "spectra.png").code == 0
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")


def test_project_then_export_gives_the_update_back(run, tmp_path):
    adapters = make_collection(tmp_path / "adapters", rank=(2, 4), lora_alpha=(8, 3))
    run("build", adapters.folder, "-k", "1.0", "-o", tmp_path / "subspace")
    result = run("project", tmp_path / "subspace", adapters.folder, "-o", tmp_path / "store", "--json")
    errors = json.loads(result.out)["adapters"]
    assert set(errors) == set(adapters.names)
    assert max(row["largest_error"] for row in errors.values()) < 1e-5
    assert run("export", tmp_path / "store", "adapter-1", "-o", tmp_path / "lora").code == 0
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    for module, update in adapters.updates["adapter-1"].items():
        stem = f"base_model.model.{module}"
        product = tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()
        scaling = config["lora_alpha"] / config["r"]
        torch.testing.assert_close(scaling * product, update, rtol=1e-4, atol=1e-4)
    store = AdapterStore.from_pretrained(tmp_path / "store")
    assert store.names == tuple(adapters.names)


@pytest.mark.parametrize("rank", [1, 3])
def test_export_truncates(run, adapters, tmp_path, rank):
    run("build", adapters.folder, "-k", 5, "-o", tmp_path / "subspace")
    run("project", tmp_path / "subspace", adapters.folder, "-o", tmp_path / "store")
    run("export", tmp_path / "store", "adapter-1", "--rank", rank, "-o", tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == rank


def test_an_interrupted_build_leaves_only_what_it_resumes_from(run, adapters, tmp_path, monkeypatch):
    class Interrupted(SubspaceBuilder):
        def fit(self, *arguments, **options):
            super().fit(*arguments, **options)
            raise KeyboardInterrupt

    monkeypatch.setattr(build, "SubspaceBuilder", Interrupted)
    result = run("build", adapters.folder, "-k", 5, "-o", tmp_path / "out" / "subspace")
    assert result.code == 130
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"subspace.work"}
    monkeypatch.undo()
    assert run("build", adapters.folder, "-k", 5, "-o", tmp_path / "out" / "subspace").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"subspace"}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_while_writing_leaves_nothing(adapters, tmp_path):
    # The tensors' writer sleeps, so that the signal arrives in the middle of writing.
    code = (
        "import sys, time\n"
        "import eigenpeft.artifacts.storage as storage\n"
        "save = storage.save_file\n"
        "def slow(tensors, path, *args):\n"
        "    save(tensors, path, *args)\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "storage.save_file = slow\n"
        "from eigenpeft.cli import main\n"
        f"sys.argv = ['eigenpeft', 'build', {str(adapters.folder)!r}, '-k', '5', '-o', {str(tmp_path / 'out')!r}]\n"
        "main()\n"
    )
    assert find_spec("eigenpeft") is not None
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background the signal is ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    while "writing" not in (line := process.stdout.readline()):
        assert line or process.poll() is None, process.stderr.read()
    before = {path.name for path in tmp_path.iterdir()}
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert any(name.endswith(".tmp") for name in before)  # it was in the middle of it
    # The fitted modules stay for the next run of the same command; nothing else does.
    assert {path.name for path in tmp_path.iterdir()} - {"out.work"} == {"adapters"}


def test_build_shares_banks_and_says_what_that_costs(run, adapters, tmp_path):
    done = run("build", adapters.folder, "-k", "4", "--share", "layers", "--out", tmp_path / "shared")
    assert done.code == 0, done.err
    subspace = PrincipalSubspace.from_pretrained(tmp_path / "shared")
    assert len(subspace.banks) < len(subspace)
    alone = SubspaceBuilder(4).fit(AdapterCollection.from_pretrained(adapters.folder)).subspace_
    assert f"{len(subspace)} modules share {len(subspace.banks)} banks." in done.out
    assert f"would explain {alone.explained_share:.3f} and take" in " ".join(done.out.split())
    assert f"{alone.n_bytes / subspace.n_bytes:.1f} times as much" in " ".join(done.out.split())
