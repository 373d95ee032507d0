"""The command doctor: versions, what is missing, and which quantisation back-ends work here."""

import importlib
import importlib.metadata
import importlib.util
import platform
import warnings
from typing import Annotated, Any

import torch
import typer
from packaging.version import Version
from rich.table import Table

from eigenpeft.cli.app import Json, app, console, print_json
from eigenpeft.report.markup import escape
from eigenpeft.version import __version__

# (distribution, oldest version, what needs it; "" = always needed)
PACKAGES = (
    ("torch", "2.4", ""),
    ("peft", "0.21", ""),
    ("transformers", "4.56", ""),
    ("huggingface_hub", "0.34", ""),
    ("safetensors", "0.5", ""),
    ("datasets", "4.0", ""),
    ("accelerate", "1.10", ""),
    ("trl", "1.16", "the commands sft, dpo, kto, reward, grpo, rloo, distillation: pip install 'eigenpeft[trl]'"),
    ("matplotlib", "3.8", "figures: pip install 'eigenpeft[plots]'"),
    ("vllm", "0.32", "serving the members of a store: pip install 'eigenpeft[vllm]'"),
    ("flwr", "1.42", "federated training: pip install 'eigenpeft[federated]'"),
    ("gguf", "0.17", "export for llama.cpp: pip install 'eigenpeft[gguf]'"),
)
# (distribution, module that must import)
BACK_ENDS = (
    ("bitsandbytes", "bitsandbytes"),
    ("gptqmodel", "gptqmodel"),
    ("autoawq", "awq"),
    ("hqq", "hqq"),
    ("torchao", "torchao"),
    ("optimum-quanto", "optimum.quanto"),
    ("aqlm", "aqlm"),
    ("eetq", "eetq"),
)
# The oldest PEFT that transformers asks for in its own `add_adapter`; get_peft_model does not ask.
_TRANSFORMERS_PEFT = "transformers.integrations.peft"


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, or None.

    Args:
        distribution: Its name.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine() -> dict[str, Any]:
    """What is here: "python", "devices", "packages", "back_ends" and "problems", a list of sentences.

    Examples:
        >>> from eigenpeft.cli.doctor import examine
        >>> examine()["packages"]["peft"]["ok"]
        True
    """
    packages: dict[str, dict[str, Any]] = {}
    problems = []
    for name, oldest, use in PACKAGES:
        version = installed(name)
        ok = version is not None and Version(version) >= Version(oldest)
        packages[name] = {"version": version, "oldest": oldest, "needed_for": use or "everything", "ok": ok}
        if version is not None and not ok:
            problems.append(f"{name} {version} is older than {oldest}: pip install -U '{name}>={oldest}'.")
        elif version is None and not use:
            problems.append(f"{name} is not installed: pip install '{name}>={oldest}'.")
    return {
        "eigenpeft": __version__,
        "python": platform.python_version(),
        "devices": _devices(),
        "packages": packages,
        "back_ends": {name: _back_end(name, module) for name, module in BACK_ENDS},
        "problems": problems + _integration_problems(packages["peft"]["version"]),
    }


def _devices() -> dict[str, Any]:
    return {
        "cpu_threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "mps": torch.backends.mps.is_available(),
    }


def _back_end(name: str, module: str) -> dict[str, Any]:
    version = installed(name)
    if version is None:
        return {"version": None, "imports": False, "error": None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # whatever a broken compiled package raises is what is to be told
        return {"version": version, "imports": False, "error": f"{type(error).__name__}: {error}"}
    return {"version": version, "imports": True, "error": None}


def _integration_problems(peft_version: str | None) -> list[str]:
    integration = importlib.import_module(_TRANSFORMERS_PEFT)
    wanted = getattr(integration, "MIN_PEFT_VERSION", None)
    if peft_version is None or wanted is None or Version(peft_version) >= Version(wanted):
        return []
    return [
        f"transformers {installed('transformers')} asks for peft >= {wanted} in `model.add_adapter` and peft is "
        f"{peft_version}: use `peft.get_peft_model`, which does not ask, or another transformers."
    ]


@app.command()
def doctor(as_json: Json = False, strict: Annotated[bool, typer.Option(help="Exit with 1 on any problem.")] = False):
    """Show versions, what is missing, and which quantisation back-ends import here.

    Example: eigenpeft doctor --json
    """
    found = examine()
    if as_json:
        print_json(found)
    else:
        table = Table("package", "version", "state", title=f"eigenpeft {found['eigenpeft']}, Python {found['python']}")
        for name, entry in found["packages"].items():
            absent = f"absent; for {escape(entry['needed_for'])}"  # 'eigenpeft[trl]' is not markup
            table.add_row(
                name, entry["version"] or "-", "ok" if entry["ok"] else absent if not entry["version"] else "old"
            )
        for name, entry in found["back_ends"].items():
            table.add_row(
                f"{name} (quantisation)",
                entry["version"] or "-",
                "imports" if entry["imports"] else escape(entry["error"] or "absent"),
            )
        console.print(table)
        devices = found["devices"]
        console.print(f"{devices['cpu_threads']} CPU threads; CUDA: {', '.join(devices['cuda']) or 'none'}.")
        for problem in found["problems"]:
            console.print(f"Problem: {problem}", markup=False)
        if not found["problems"]:
            console.print("No problems found.")
    if strict and found["problems"]:
        raise typer.Exit(1)
