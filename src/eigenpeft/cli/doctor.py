"""The command doctor: which versions are here, what is missing or does not fit together, and what to install."""

import importlib
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Annotated, Literal

import torch
import typer
from packaging.requirements import Requirement
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from rich.markup import escape
from rich.table import Table

from eigenpeft.cli.app import Json, app, console, print_json
from eigenpeft.tuners.basis_store import SEARCH_PATH
from eigenpeft.tuners.eigenlora.model import EigenLoraModel
from eigenpeft.tuners.moslora.model import MosLoraModel

_OPTIONAL = {
    "trl": "trainers for SFT, DPO, KTO, GRPO, RLOO, reward models: pip install 'eigenpeft[trl]'",
    "accelerate": "several devices, `accelerate launch -m eigenpeft`: pip install accelerate",
    "matplotlib": "figures, `inspect --plot`: pip install 'eigenpeft[plots]'",
}
_OURS = {"EIGENLORA": EigenLoraModel, "MOSLORA": MosLoraModel}
# Back-ends that hold base weights in fewer bits; whether one works shows only on importing it.
_QUANTISATION = {
    "bitsandbytes": "bitsandbytes",
    "gptqmodel": "gptqmodel",
    "awq": "autoawq",
    "hqq": "hqq",
    "torchao": "torchao",
    "aqlm": "aqlm",
    "eetq": "eetq",
    "auto_round": "auto-round",
}
# transformers' own `model.add_adapter` asks for a PEFT that was not released when this was written; get_peft_model,
# PeftModel and AutoPeftModel do not go through it.
_ADD_ADAPTER_SINCE, _ADD_ADAPTER_NEEDS = Version("5.24.0.dev0"), Version("0.22.0.dev0")


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        status: "ok", "missing" (optional and absent), "warning" or "error" (eigenpeft does not work).
        found: Version or state.
        advice: What to do, where there is something to do.
    """

    name: str
    status: Literal["ok", "missing", "warning", "error"]
    found: str
    advice: str = ""


def examine() -> list[Check]:
    """Look at everything; loads no model and needs no network."""
    return [
        Check("python", "ok", platform.python_version(), ""),
        Check("platform", "ok", platform.platform(), ""),
        *_required(),
        *[_importable(name, "optional", advice) for name, advice in _OPTIONAL.items()],
        *[
            _importable(name, "quantisation", f"only for base weights of fewer bits: pip install {package}")
            for name, package in _QUANTISATION.items()
        ],
        _add_adapter(),
        _methods(),
        _devices(),
        *_environment(),
    ]


@app.command()
def doctor(
    as_json: Json = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 on warnings too.")] = False,
) -> None:
    """Show versions, what is missing, which quantisation back-ends import, and what does not fit together.

    Example: eigenpeft doctor --json > environment.json
    """
    checks = examine()
    bad = [check for check in checks if check.status in (("error", "warning") if strict else ("error",))]
    if as_json:
        print_json({"ok": not bad, "checks": [asdict(check) for check in checks]})
    else:
        colours = {"ok": "green", "missing": "dim", "warning": "yellow", "error": "red"}
        table = Table("", "status", "found", "what to do")
        for check in checks:
            colour = colours[check.status]
            table.add_row(check.name, f"[{colour}]{check.status}[/]", escape(check.found), escape(check.advice))
        console.print(table)
    if bad:
        raise typer.Exit(1)


def _required() -> list[Check]:
    checks = []
    for requirement in map(Requirement, requires("eigenpeft") or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        command = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            checks.append(Check(requirement.name, "error", "not installed", command))
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        checks.append(Check(requirement.name, "ok" if fits else "error", found, "" if fits else command))
    return checks


def _importable(name: str, group: str, advice: str) -> Check:
    label = f"{name} ({group})"
    try:
        importlib.import_module(name)  # optional: nothing may import it when eigenpeft is imported
    except ModuleNotFoundError as error:
        if error.name == name:
            return Check(label, "missing", "not installed", advice)
        return Check(label, "warning", f"needs {error.name}", f"pip install {error.name}")
    except Exception as error:  # a back-end may fail in any way where its library or driver is absent
        return Check(
            label, "warning", f"does not import: {type(error).__name__}: {error}"[:200], "reinstall it, or do without"
        )
    try:
        return Check(label, "ok", version(name))
    except PackageNotFoundError:
        return Check(label, "ok", "imports")


def _add_adapter() -> Check:
    transformers, peft = (Version(version(name)) for name in ("transformers", "peft"))
    name = "transformers' own add_adapter"
    if transformers >= _ADD_ADAPTER_SINCE and peft < _ADD_ADAPTER_NEEDS:
        return Check(
            name,
            "warning",
            f"transformers {transformers} with peft {peft}",
            "transformers' model.add_adapter asks for peft >= 0.22; use get_peft_model and PeftModel, which do not, or "
            "install transformers < 5.24",
        )
    return Check(name, "ok", f"transformers {transformers} with peft {peft}")


def _methods() -> Check:
    tuners = {kind.value: tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    missing = [name for name, tuner in _OURS.items() if tuners.get(name) is not tuner]
    if missing:
        return Check(
            "methods known to PEFT", "error", f"PEFT lacks {', '.join(missing)}", "reinstall peft and eigenpeft"
        )
    return Check("methods known to PEFT", "ok", ", ".join(_OURS))


def _devices() -> Check:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    names += ["Apple MPS"] if torch.backends.mps.is_available() else []
    return Check("devices", "ok", ", ".join(names) or f"CPU alone, {torch.get_num_threads()} threads")


def _environment() -> list[Check]:
    names = (SEARCH_PATH, "HF_HUB_OFFLINE", "HF_HOME")
    return [Check(name, "ok", os.environ[name]) for name in names if name in os.environ] + [
        Check("executable", "ok", sys.executable)
    ]
