"""A dozen kills of the commands that write; `python -m tests.faults.kill --n 200` is the long version."""

import sys

import pytest

from tests.faults.kill import kill_at_random

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
]


def test_a_dozen_kills():
    assert sum(kill_at_random(12, seed=1).values()) >= 12
