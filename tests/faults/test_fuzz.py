"""Fuzzing: mutated configs, headers, stores, user tables and comparisons end in our own errors, in time and in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# EIGENPEFT_FUZZ=50000 for a night; `python -m tests.faults.fuzz --count 2000` alone prints what came of each file.
COUNT = int(os.environ.get("EIGENPEFT_FUZZ", "300"))
_ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform == "win32", reason="needs signal.alarm")
@pytest.mark.timeout(600 + COUNT)
def test_mutated_files_end_in_our_own_errors(tmp_path):
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.faults.fuzz", "--count", str(COUNT)],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout, ran.stderr[-2000:]  # a signal, such as SIGBUS, ends the process without a result
    result = json.loads(ran.stdout)
    assert result["failures"] == []
    assert result["refused"] > COUNT / 4
    assert result["read"] > COUNT / 20  # some mutations change nothing that matters: the readers do read
    assert result["megabytes"] < 200
