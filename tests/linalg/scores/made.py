"""Random factors of adapters, by seed."""

import torch


def factors_of(*, n_adapters=5, m=14, n=18, ranks=(3, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(m, ranks[i % len(ranks)], generator=generator),
            torch.randn(ranks[i % len(ranks)], n, generator=generator),
        )
        for i in range(n_adapters)
    ]
