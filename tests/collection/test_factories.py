"""The factories keep what they promise: updates inside the shared directions, and as much outside as the noise."""

import pytest
import torch

from tests.factories import make_collection, tiny_bert, tiny_gpt2, tiny_llama


def outside(made):
    """Largest share of an update's norm that the shared directions miss."""
    shares = []
    for updates in made.updates.values():
        for module, delta_weight in updates.items():
            left, right = made.components_out[module], made.components_in[module]
            missed = delta_weight - left.mT @ (left @ delta_weight @ right.mT) @ right
            shares.append(float(missed.norm() / delta_weight.norm()))
    return max(shares)


def test_updates_lie_in_the_shared_directions_but_for_noise(tmp_path):
    assert outside(make_collection(tmp_path / "clean", rank=(1, 3))) < 1e-6
    assert 0.05 < outside(make_collection(tmp_path / "noisy", noise=0.1)) < 0.5


def test_same_seed_same_files(tmp_path):
    first, again, other = (make_collection(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    files = [(made.folder / "adapter-0" / "adapter_model.safetensors").read_bytes() for made in (first, again, other)]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_tiny_models_are_seeded_and_leave_the_global_generator_alone(make):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two = make(), make()
    assert torch.rand(1) == expected
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(make(seed=1).parameters()))
