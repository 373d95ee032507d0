"""Without the extra `trl` there is nothing to collect here; with it, a saved subspace of the tiny model."""

from importlib.util import find_spec

import pytest

from tests.tuners.conftest import random_subspace, tiny_llama

collect_ignore_glob = [] if find_spec("trl") else ["*"]


@pytest.fixture(scope="session")
def subspace_folder(tmp_path_factory):
    """Components for three modules a layer, saved."""
    place = tmp_path_factory.mktemp("trl") / "subspace"
    random_subspace(tiny_llama(), ("q_proj", "v_proj", "down_proj")).save_pretrained(place)
    return str(place)
