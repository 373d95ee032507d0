"""Settings of every test: no network, one thread; and where the real adapters lie."""

import gc
import os
from pathlib import Path

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Keep what the imports made out of later garbage collections, of which each transformers `Trainer` runs one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shipped_adapters_dir() -> Path:
    """Three real GPT-2 adapters that ship with the tests, their first layer alone."""
    return Path(__file__).parent / "data" / "gpt2_adapters"


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """Folder of real material that is not part of the repository; tests that need it are skipped without it."""
    place = Path(os.environ.get("EIGENPEFT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not place.is_dir():
        pytest.skip(f"needs real data: {place} does not exist; set EIGENPEFT_TEST_DATA")
    return place


@pytest.fixture(scope="session")
def real_adapters_dir(real_data_dir: Path) -> Path:
    """Thirteen real GPT-2 adapters, one folder each."""
    place = real_data_dir / "loras" / "gpt2"
    if not place.is_dir():
        pytest.skip(f"needs real adapters: {place} does not exist; set EIGENPEFT_TEST_DATA")
    return place
