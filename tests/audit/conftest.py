"""Collections whose truth is known."""

import pytest

from eigenpeft import AdapterCollection
from tests.factories import make_collection

WIDE = {f"layer.{i}.{name}": (80, 96) for i in range(2) for name in ("query", "value")}


@pytest.fixture
def planted(tmp_path):
    """Ten adapters in six shared directions a side."""

    def make(*, seed=0, noise=0.1, n_shared=6, n_adapters=10):
        made = make_collection(
            tmp_path / f"planted-{seed}-{noise}-{n_shared}",
            n_adapters=n_adapters,
            modules=WIDE,
            n_shared=n_shared,
            noise=noise,
            seed=seed,
        )
        return AdapterCollection.from_pretrained(made.folder)

    return make


def delta(collection, module, name):
    """ΔW of one adapter, float64."""
    read = next(read for read in collection.factors(module) if read.adapter == name)
    return read.lora_B.double() @ read.lora_A.double()


@pytest.fixture
def update():
    return delta
