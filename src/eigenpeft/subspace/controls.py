"""Controls: what a subspace must beat before anyone believes in it."""

from dataclasses import replace

import torch
from huggingface_hub.utils import tqdm

from eigenpeft.collection.reader import AdapterCollection
from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.bases.fitting import explained_share_curve
from eigenpeft.linalg.factored import factored_svd, frobenius_norm
from eigenpeft.linalg.orthogonal import fix_signs, orthonormal_rows
from eigenpeft.linalg.shares import added_shares
from eigenpeft.subspace.info import SubspaceInfo
from eigenpeft.subspace.module import ModuleSubspace
from eigenpeft.subspace.principal import PrincipalSubspace
from eigenpeft.subspace.seeding import seeded_generator


def random_subspace(*, like: PrincipalSubspace, seed: int = 0) -> PrincipalSubspace:
    """Uniformly random orthonormal bases of the same sizes: as good as any subspace that learnt nothing.

    Args:
        like: Gives modules, widths and numbers of components.
        seed: Seed of the random directions; they depend on the module's name, not on its position.

    Returns:
        A subspace whose singular values and explained shares are zero, because nothing was fitted. Modules that share a bank
        share a random one.

    Examples:
        >>> import torch
        >>> from eigenpeft.subspace import ModuleSubspace, PrincipalSubspace
        >>> ones = torch.ones(2)
        >>> spectra = {"singular_values_in": ones, "singular_values_out": ones, "explained_variance_ratio": ones / 2}
        >>> bank = ModuleSubspace(torch.eye(2, 4), torch.eye(2, 3), **spectra)
        >>> random_subspace(like=PrincipalSubspace({"layer": bank}), seed=0)["layer"].components_in.shape
        torch.Size([2, 4])
    """

    def random_bank(name: str, bank: ModuleSubspace) -> ModuleSubspace:
        sides = []
        for side, components in (("in", bank.components_in), ("out", bank.components_out)):
            gaussian = torch.randn(components.shape, generator=seeded_generator(seed, name, f"random {side}"))
            sides.append(orthonormal_rows(gaussian))
        return ModuleSubspace(
            *sides,
            singular_values_in=torch.zeros(bank.n_components_in),
            singular_values_out=torch.zeros(bank.n_components_out),
            explained_variance_ratio=torch.zeros(bank.n_components),
        )

    modules = like.map_banks(random_bank)
    info = replace(like.info, method="random", sources=(), measured_on=(), seed=seed, n_pseudo_components=0)
    return PrincipalSubspace(modules, info=info)


def shuffled_subspace(subspace: PrincipalSubspace, *, seed: int = 0) -> PrincipalSubspace:
    """Every bank gets the bases of another bank of the same shape: fitted, but not to this weight.

    What it keeps of the original's advantage is not about the module, such as directions that all layers share.

    Args:
        subspace: At least two banks of every shape.
        seed: Seed of the permutation; no module keeps its own bank.

    Returns:
        A subspace whose explained shares are zero, because they do not hold for the new places.

    Raises:
        SubspaceError: If a bank is the only one of its shape.

    Examples:
        >>> import torch
        >>> from eigenpeft.subspace import ModuleSubspace, PrincipalSubspace
        >>> ones = torch.ones(2)
        >>> spectra = {"singular_values_in": ones, "singular_values_out": ones, "explained_variance_ratio": ones / 2}
        >>> bank = ModuleSubspace(torch.eye(2, 4), torch.eye(2, 3), **spectra)
        >>> other = ModuleSubspace(torch.eye(4)[2:], torch.eye(2, 3), **spectra)
        >>> subspace = PrincipalSubspace({"first": bank, "second": other})
        >>> torch.equal(shuffled_subspace(subspace, seed=0)["first"].components_in, other.components_in)
        True
    """
    groups: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, bank in subspace.banks.items():
        groups.setdefault((bank.components_out.shape, bank.components_in.shape), []).append(name)
    alone = [names[0] for names in groups.values() if len(names) == 1]
    if alone:
        raise SubspaceError(
            f"{len(alone)} banks, such as that of {alone[0]!r}, are the only ones of their shape and number of components; "
            "use random_subspace(like=...) instead, or build with the same number for all and a bank for each module."
        )
    source = {}
    for shape, names in groups.items():
        order = torch.randperm(len(names), generator=seeded_generator(seed, str(shape), "shuffle")).tolist()
        # Each takes from the next one on a random circle, so that none takes from itself.
        source |= {names[i]: names[j] for i, j in zip(order, order[1:] + order[:1], strict=True)}
    modules = subspace.map_banks(
        lambda name, bank: replace(
            subspace[source[name]], explained_variance_ratio=torch.zeros_like(bank.explained_variance_ratio)
        )
    )
    return PrincipalSubspace(modules, info=replace(subspace.info, method="shuffled", measured_on=(), seed=seed))


def mean_only_subspace(
    collection: AdapterCollection, *, n_components: int = 1, progress: bool = True
) -> PrincipalSubspace:
    """The leading directions of the mean update: what averaging the adapters has, and nothing of their differences.

    Args:
        collection: Adapters, every one scaled to unit norm in a module before the mean is taken.
        n_components: Components per side; 1 is the rank-one mean.
        progress: Show a progress bar.

    Returns:
        A subspace whose singular values are those of the mean; explained shares are of the adapters, as usual.

    Raises:
        SubspaceError: If `n_components` is less than 1, or above the sum of the adapters' ranks or a side's width in a module; or
            if no adapter changes the module.
        CollectionError: If an adapter cannot be read any more, or holds numbers that are not finite.

    Examples:
        >>> from eigenpeft.demo import shipped_adapters
        >>> collection = AdapterCollection.from_pretrained([shipped_adapters() / "cr", shipped_adapters() / "mr"])
        >>> mean_only_subspace(collection, n_components=1, progress=False)[collection.modules[0]].components_in.shape
        torch.Size([1, 384])
    """
    modules = {}
    for module in tqdm(collection.modules, desc="Averaging", unit="module", disable=not progress):
        pairs = [(read.lora_B, read.lora_A) for read in collection.factors(module)]
        pairs = [(lora_B / norm, lora_A) for lora_B, lora_A in pairs if (norm := frobenius_norm(lora_B, lora_A)) > 0]
        most = min(sum(len(lora_A) for _, lora_A in pairs), *collection.shapes[module])
        if not 1 <= n_components <= most:
            raise SubspaceError(
                f"n_components={n_components} must be between 1 and {most}, the largest rank that the mean can have in {module!r}."
            )
        mean = factored_svd(
            torch.cat([lora_B for lora_B, _ in pairs], dim=1) / len(pairs), torch.cat([lora_A for _, lora_A in pairs])
        )
        components_in, components_out = (fix_signs(rows[:n_components].float()) for rows in (mean.Vh, mean.U.mT))
        curve = explained_share_curve(pairs, components_in=components_in, components_out=components_out)
        values = mean.S[:n_components].float()
        modules[module] = ModuleSubspace(
            components_in,
            components_out,
            singular_values_in=values,
            singular_values_out=values.clone(),
            explained_variance_ratio=added_shares(curve).float(),
        )
    info = SubspaceInfo(
        base_model_name_or_path=collection.base_model,
        base_model_revision=collection.base_model_revision,
        method="mean_only",
        n_components=n_components,
        sources=tuple(adapter.record() for adapter in collection.adapters),
        measured_on=collection.names,
        fan_in_fan_out=tuple(module for module in collection.modules if collection.fan_in_fan_out(module)),
        embeddings=tuple(module for module in collection.modules if collection.is_embedding(module)),
    )
    return PrincipalSubspace(modules, info=info)
