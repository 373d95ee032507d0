"""pytest plug-in: PEFT's own tests see one of our configurations wherever they name LoraConfig."""

import functools
import inspect
import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset, DatasetDict
from parameterized import param

import eigenpeft
from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.eigenlora.model import EigenLoraModel
from tests.peft_suite.random_subspaces import random_subspace

METHOD = os.environ["EIGENPEFT_SUITE_METHOD"]
ROWS = os.environ.get("EIGENPEFT_SUITE_ROWS", "").split()
CORE = os.environ.get("EIGENPEFT_SUITE_CORE", "")
TEMPLATE = peft.LoraConfig
OURS: Any = {"lora": TEMPLATE, "eigenlora": eigenpeft.EigenLoraConfig, "moslora": eigenpeft.MosLoraConfig}[METHOD]
# Values in a refusal differ from row to row; the field is what matters.
REFUSED_VALUE = re.compile(r"=(?:\w+\(.*?\)|'[^']*'|\S+)(?= is not supported)")
_alive = []  # the subspaces, which adapters refer to by fingerprint
_results: dict[str, dict[str, str]] = {}


class _Everything(defaultdict):
    """Says that every hub model was fetched before, so that PEFT's tests stay offline."""

    def __contains__(self, key: object) -> bool:
        return True


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # The tests' modules bind the name when they are imported; PEFT itself keeps its own class.
    peft.LoraConfig = OURS
    if METHOD == "eigenlora":
        _give_subspaces()


def _give_subspaces() -> None:
    OURS.__init__ = functools.partialmethod(OURS.__init__, core=CORE)
    injecting = EigenLoraModel.injecting.__func__

    def injecting_with_subspace(cls, model, *, config, adapter_name):
        if config.subspace_sha256 is None:
            if config.target_modules is None and not config.target_parameters:
                cls._prepare_adapter_config(cls, config, cls.get_model_config(model))
            subspace = random_subspace(model, parameters=bool(config.target_parameters))
            _alive.append(subspace)
            config.subspace, config.subspace_sha256 = "random", eigenpeft.tuners.layers.shared_bases.remember(subspace)
        return injecting(cls, model, config=config, adapter_name=adapter_name)

    EigenLoraModel.injecting = classmethod(injecting_with_subspace)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> None:
    utilities = __import__(f"{module_path.parent.name}.testing_utils", fromlist=["testing_utils"])
    utilities._HUB_MODEL_ACCESSES = _Everything(int)
    utilities.load_dataset_english_quotes = _quotes


def _quotes() -> DatasetDict:
    quotes = [f"quote number {number} is short" for number in range(32)]
    return DatasetDict({"train": Dataset.from_dict({"quote": quotes})})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    peft.LoraConfig = TEMPLATE  # what the tests import inside their functions is PEFT's own again
    chosen, others = [], []
    for item in items:
        (chosen if _concerns_lora(item) and _is_wanted(item) else others).append(item)
    for tests in {item.cls for item in chosen if hasattr(item.cls, "check_requires_grad")}:
        tests.check_requires_grad = _with_our_names(tests.check_requires_grad)
    items[:] = chosen
    config.hook.pytest_deselected(items=others)


def _with_our_names(check: Any) -> Any:
    """A check that lists LoRA's tensors by name, for whatever tensors we have in the place of each."""

    def translated(self: Any, model: Any, *expected: str) -> None:
        known = [name for name, _ in model.named_parameters()]
        ours = [name for name in known if any(_stands_for(name, lora) for lora in expected)]
        check(self, model, *ours)

    return translated


def _stands_for(name: str, lora: str) -> bool:
    return name == lora or ("lora_" in lora and name.startswith(lora.removesuffix("weight")))


def _concerns_lora(item: Any) -> bool:
    """Whether a row of the parametrisation, or the test's own text, names the configuration that we stand in for."""
    parameters = getattr(item, "callspec", None)
    rows = parameters.params.values() if parameters else _row_of_parameterized(item.function)
    values = list(_flat(rows))
    classes = {value if inspect.isclass(value) else type(value) for value in values}
    configs = {kind for kind in classes if issubclass(kind, peft.PeftConfig)}
    if configs:
        return OURS in configs
    text = inspect.getsource(item.function)
    setup = "".join(
        inspect.getsource(function)
        for name, function in inspect.getmembers(item.cls, inspect.isfunction)
        if not name.startswith("test_") and item.cls.__module__ == function.__module__
    )
    return "LoraConfig(" in text.replace("AdaLoraConfig(", "") or "LoraConfig(" in setup or "get_config" in text


def _is_wanted(item: Any) -> bool:
    """Whether the row, or the text of a test without rows of options, names one of the options asked for."""
    parameters = getattr(item, "callspec", None)
    rows = repr(parameters.params) if parameters else ""
    text = "" if parameters and "config_kwargs" in parameters.params else inspect.getsource(item.function)
    return not ROWS or any(word in rows or word in text for word in ROWS)


def _row_of_parameterized(function: Any) -> list[Any]:
    """The row that `parameterized.expand` keeps in the closure of each of its functions."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return [value for cell in cells if isinstance(cell, param) for value in cell.args]


def _flat(values: Any) -> Any:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Count as skipped what the method refuses by name."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    if report.outcome == "failed" and METHOD != "lora" and isinstance(error, AdapterConfigError):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "refused: " + REFUSED_VALUE.sub("", str(error)))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # The same name for every method: rows are named after the configuration, or what is before "Config" in its name.
    name = report.nodeid.partition("peft_tests/")[2].replace(OURS.__name__, "LoraConfig")
    name = name.replace(f"_{OURS.__name__.removesuffix('Config')}_", "_Lora_")
    if report.when == "call" or report.outcome != "passed":
        if report.outcome == "skipped":
            expected = hasattr(report, "wasxfail")
            reason = report.wasxfail if expected else report.longrepr[2]
        else:
            reason = str(report.longrepr or "").strip().splitlines()
            reason = next((line[2:] for line in reversed(reason) if line.startswith("E ")), "")
        if report.when != "teardown" or report.outcome == "failed":
            _results[name] = {"outcome": report.outcome, "reason": str(reason).strip()[:300]}


def pytest_sessionfinish(session: pytest.Session) -> None:
    Path(os.environ["EIGENPEFT_SUITE_RESULT"]).write_text(json.dumps(_results))
