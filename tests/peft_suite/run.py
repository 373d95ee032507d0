"""Run PEFT's own tests against one of our methods, beside LoRA itself, and write down what passes.

    python tests/peft_suite/run.py --peft-source DIR --method eigenlora --core full

`DIR` holds PEFT's `tests/`, of the release that is installed; see README.md beside this file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
from tests.peft_suite.not_applicable import reason_not_applicable  # noqa: E402 (run as a script, from anywhere)

FILES = (
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_target_parameters",
    "test_config",
    "test_initialization",
    "test_low_level_api",
    "test_mixed",
    "test_tuners_utils",
    "test_lora_conversion",
    "test_trainable_tokens",
    "test_lora_variants",
    "test_loraplus",
    "test_lorafa",
    "test_other",
    "test_helpers",
    "test_mapping",
)


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(arguments.work or scratch)
        package = _copy_tests(Path(arguments.peft_source), work)
        environment = _environment(work)
        subprocess.run([sys.executable, "-c", _WRITE_CACHE, str(work / "home" / "hub")], env=environment, check=True)
        baseline = _run("lora", "", package, environment, arguments)
        results = (
            baseline
            if arguments.method == "lora"
            else _run(arguments.method, arguments.core, package, environment, arguments)
        )
    if _report(arguments, results, baseline):
        raise SystemExit(1)


_WRITE_CACHE = (
    "import sys, pathlib; from tests.peft_suite.tiny_models import write_cache; write_cache(pathlib.Path(sys.argv[1]))"
)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peft-source", required=True, help="folder with PEFT's tests/ of the installed release")
    parser.add_argument("--method", required=True, choices=("lora", "eigenlora", "moslora"))
    parser.add_argument("--core", default="low_rank", choices=("low_rank", "full", "diagonal"), help="of EigenLoRA")
    parser.add_argument("--files", nargs="+", default=FILES, help="test files, without .py")
    parser.add_argument("--select", default="", help="as pytest's -k")
    parser.add_argument("--rows", nargs="+", default=(), help="only tests that name one of these options of LoraConfig")
    parser.add_argument("--work", help="folder to keep (tiny models, LoRA's own results) for the next run")
    parser.add_argument("--reuse", action="store_true", help="report the last whole run in --work again")
    parser.add_argument("--summary", help="JSON file to add the counts to")
    return parser.parse_args()


def _copy_tests(source: Path, work: Path) -> Path:
    tests = source / "tests"
    if not (tests / "testing_common.py").is_file():
        raise SystemExit(f"{tests} has no testing_common.py; pass the unpacked source of the installed PEFT release.")
    package = work / "peft_tests"
    shutil.copytree(tests, package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("conftest.py", "__pycache__"))
    (package / "__init__.py").touch()
    return package


def _environment(work: Path) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HOME": str(work / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _run(method: str, core: str, package: Path, environment: dict[str, str], arguments: argparse.Namespace) -> dict:
    label = _label(method, core)
    result = package.parent / f"result-{label}.json"
    whole = not arguments.select and not arguments.rows and tuple(arguments.files) == FILES
    if result.is_file() and (arguments.reuse or (method == "lora" and arguments.method != "lora")):
        return json.loads(result.read_text())
    settings = {
        "EIGENPEFT_SUITE_METHOD": method,
        "EIGENPEFT_SUITE_CORE": core,
        "EIGENPEFT_SUITE_ROWS": " ".join(arguments.rows),
        "EIGENPEFT_SUITE_RESULT": str(result if whole else result.with_suffix(".part.json")),
    }
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--noconftest", "-p", "tests.peft_suite.plugin"]
    command += ["-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider", f"--rootdir={package.parent}"]
    command += ["-k", arguments.select] if arguments.select else []
    command += [str(package / f"{name}.py") for name in arguments.files]
    log = package.parent / f"log-{label}.txt"
    with log.open("w") as stream:
        subprocess.run(
            command,
            env=environment | settings,
            cwd=package.parent,
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        )
    print(f"{label}: {log.read_text().strip().splitlines()[-1]}")
    return json.loads(Path(settings["EIGENPEFT_SUITE_RESULT"]).read_text())


def _label(method: str, core: str) -> str:
    return f"{method}-{core}" if method == "eigenlora" else method


def _explained(name: str, result: dict[str, str], arguments: argparse.Namespace) -> dict[str, str]:
    """A failure that says nothing about the method counts as skipped, with the reason."""
    if result["outcome"] != "failed" or arguments.method == "lora":
        return result
    reason = reason_not_applicable(name, _label(arguments.method, arguments.core))
    return result if reason is None else {"outcome": "skipped", "reason": f"does not apply: {reason}"}


def _report(arguments: argparse.Namespace, results: dict, baseline: dict) -> int:
    """Print and save the comparison; returns how many tests fail that LoRA passes."""
    results = {name: _explained(name, result, arguments) for name, result in results.items()}
    counts, lora = (dict(Counter(result["outcome"] for result in each.values())) for each in (results, baseline))
    worse = {
        name: result["reason"]
        for name, result in sorted(results.items())
        if result["outcome"] != "passed" and baseline.get(name, {}).get("outcome") == "passed"
    }
    failing = [name for name in worse if results[name]["outcome"] == "failed"]
    print(f"LoRA: {lora}\n{arguments.method}: {counts}\n{len(failing)} fail that LoRA passes:")
    for name in failing:
        print(f"  {name}: {worse[name]}")
    skipped = Counter(result["reason"] for result in results.values() if result["outcome"] == "skipped")
    print("Skipped, by reason:")
    for reason, count in skipped.most_common():
        print(f"  {count:4d}  {reason}")
    if arguments.summary:
        entry = {
            "counts": counts,
            "lora": lora,
            "fail_where_lora_passes": {name: worse[name] for name in failing},
            "does_not_apply": {name: why for name, why in worse.items() if why.startswith("does not apply")},
            "skipped_by_reason": dict(skipped.most_common()),
            "environment": {name: version(name) for name in ("peft", "transformers", "torch")} | {"threads": 1},
        }
        label = _label(arguments.method, arguments.core)
        path = Path(arguments.summary)
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(known | {label: entry}, indent=1, sort_keys=True) + "\n")
    return len(failing)


if __name__ == "__main__":
    main()
