"""A small subspace made of known numbers, no collection needed."""

import pytest
import torch

from eigenpeft.subspace import ModuleSubspace, PrincipalSubspace, SubspaceInfo


def random_bases(n_components, in_features, out_features, *, n_pseudo=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = [
        torch.linalg.qr(torch.randn(width, n_components, generator=generator))[0].mT.contiguous()
        for width in (in_features, out_features)
    ]
    n_principal = n_components - n_pseudo
    spectrum = torch.linspace(2.0, 1.0, n_principal)
    return ModuleSubspace(
        components_in=sides[0],
        components_out=sides[1],
        singular_values_in=spectrum,
        singular_values_out=spectrum * 0.5,
        explained_variance_ratio=spectrum / spectrum.sum() * 0.9,
    )


@pytest.fixture
def subspace():
    info = SubspaceInfo(
        base_model_name_or_path="some/base",
        sources=({"name": "a", "source": "owner/a", "rank": 4, "lora_alpha": 8, "licence": "mit", "sha256": "0" * 64},),
        measured_on=("a",),
        n_components=6,
    )
    modules = {"layer.0.query": random_bases(6, 20, 12), "layer.1.query": random_bases(5, 20, 12, n_pseudo=1, seed=1)}
    return PrincipalSubspace(modules, info=info)
