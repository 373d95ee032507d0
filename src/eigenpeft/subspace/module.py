"""A bank: the pair of bases of one adapted weight, or of several weights of one shape that share it."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from eigenpeft.errors import SubspaceError

# The tensors of one bank, in the order in which files and fingerprints list them.
TENSOR_FIELDS = (
    "components_in",
    "components_out",
    "singular_values_in",
    "singular_values_out",
    "explained_variance_ratio",
)


@dataclass(frozen=True, eq=False)
class ModuleSubspace:
    """A bank of bases for adapted weights of shape (out_features, in_features).

    The two sides may have different numbers of components. One object may serve several modules of a `PrincipalSubspace`,
    which then keeps it once, in memory and on disk.

    Raises:
        SubspaceError: If components are no matrices of at least one row, spectra and shares have other lengths than the
            components, or the sides of paired directions differ in number.

    Attributes:
        components_in: (K_in, in_features), orthonormal rows, most important first; pseudo-components last.
        components_out: (K_out, out_features), likewise.
        singular_values_in: (principal components of the side,), of the stack the input side was fitted to, descending.
        singular_values_out: The same for the output side.
        explained_variance_ratio: One entry per principal component of the longer side. Entry k is what component k + 1, on
            both sides together, adds to the explained share of the adapters' squared ΔW norms; `cumsum` gives the curve.
        paired: Whether the bank was fitted by method "paired": row k of one side belongs to row k of the other, rows have unit
            norm and are not orthogonal. Adapters lie in it by diagonal cores alone, and the shares are those of diagonal cores.

    Examples:
        >>> import torch
        >>> bank = ModuleSubspace(
        ...     torch.eye(2, 4),
        ...     torch.eye(2, 3),
        ...     singular_values_in=torch.ones(2),
        ...     singular_values_out=torch.ones(2),
        ...     explained_variance_ratio=torch.ones(2) / 2,
        ... )
        >>> bank.n_components, bank.in_features, bank.out_features, bank.truncate(1).explained_share
        (2, 4, 3, 0.5)
    """

    components_in: Tensor
    components_out: Tensor
    _: KW_ONLY
    singular_values_in: Tensor
    singular_values_out: Tensor
    explained_variance_ratio: Tensor
    paired: bool = False

    def __post_init__(self):
        sides = (self.components_in, self.components_out)
        if any(components.ndim != 2 or not len(components) for components in sides):
            raise SubspaceError(
                f"components_in {tuple(self.components_in.shape)} and components_out "
                f"{tuple(self.components_out.shape)} must be matrices with one row per component, at least one."
            )
        spectra = (self.singular_values_in, self.singular_values_out)
        fits = all(values.ndim == 1 and len(values) <= len(side) for values, side in zip(spectra, sides, strict=True))
        if not fits or self.explained_variance_ratio.shape != (max(map(len, spectra)),):
            shapes = [tuple(tensor.shape) for tensor in (*spectra, self.explained_variance_ratio)]
            raise SubspaceError(
                f"singular_values_in {shapes[0]} and singular_values_out {shapes[1]} must have one entry per principal "
                f"component of their side, at most {len(sides[0])} and {len(sides[1])}, and explained_variance_ratio "
                f"{shapes[2]} as many as the longer of them."
            )
        if self.paired and len(sides[0]) != len(sides[1]):
            raise SubspaceError(
                f"Paired directions need as many components of the input as of the output; got {len(sides[0])} and "
                f"{len(sides[1])}. Cut the longer side, or build with another method."
            )

    @property
    def n_components(self) -> int:
        """Number of components K of a side, pseudo-components included; of the larger one, where they differ."""
        return max(self.n_components_in, self.n_components_out)

    @property
    def n_components_in(self) -> int:
        """Number of components K_in of the input side, pseudo-components included."""
        return len(self.components_in)

    @property
    def n_components_out(self) -> int:
        """Number of components K_out of the output side, pseudo-components included."""
        return len(self.components_out)

    @property
    def sides(self) -> tuple[int, int]:
        """Numbers of components of both sides, (K_in, K_out)."""
        return self.n_components_in, self.n_components_out

    @property
    def n_pseudo_components(self) -> int:
        """How many of the last components are random directions rather than principal ones; of the side with most."""
        return max(
            self.n_components_in - len(self.singular_values_in), self.n_components_out - len(self.singular_values_out)
        )

    @property
    def in_features(self) -> int:
        """Width n of the weight's input."""
        return self.components_in.shape[1]

    @property
    def out_features(self) -> int:
        """Width m of the weight's output."""
        return self.components_out.shape[1]

    @property
    def explained_share(self) -> float:
        """Share of the adapters' squared ΔW norms that all principal components explain, between 0 and 1."""
        return float(self.explained_variance_ratio.double().sum())

    def truncate(self, n_components: int | tuple[int, int]) -> "ModuleSubspace":
        """The bank of the first components; views, no copies.

        Args:
            n_components: K for both sides, between 1 and the present number; a side that has fewer keeps what it has. Or
                `(K_in, K_out)`; explained shares are then those of the smaller number, a lower bound.

        Raises:
            SubspaceError: If `n_components` is less than 1 or more than there are, or asks paired directions for two numbers.
        """
        own = (self.n_components_in, self.n_components_out)
        given = n_components if isinstance(n_components, tuple) else (n_components, n_components)
        most = own if isinstance(n_components, tuple) else (self.n_components, self.n_components)
        if len(given) != 2 or not all(1 <= count <= limit for count, limit in zip(given, most, strict=True)):
            shown = f"{own[0]}" if own[0] == own[1] else f"{own[0]} (input) and {own[1]} (output)"
            raise SubspaceError(
                f"n_components={n_components} must be between 1 and the {shown} components of the "
                "subspace; build it again with a larger n_components to have more."
            )
        n_in, n_out = (min(count, limit) for count, limit in zip(given, own, strict=True))
        if self.paired and n_in != n_out:
            raise SubspaceError(
                f"n_components={n_components} asks for {n_in} and {n_out} paired directions, and each one of the input belongs "
                "to one of the output; pass one number."
            )
        spectrum_in, spectrum_out = self.singular_values_in[:n_in], self.singular_values_out[:n_out]
        return ModuleSubspace(
            components_in=self.components_in[:n_in],
            components_out=self.components_out[:n_out],
            singular_values_in=spectrum_in,
            singular_values_out=spectrum_out,
            explained_variance_ratio=self._shares(len(spectrum_in), len(spectrum_out)),
            paired=self.paired,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The bank's tensors by field name, in the shapes of the attributes."""
        return {name: getattr(self, name) for name in TENSOR_FIELDS}

    def _shares(self, n_in: int, n_out: int) -> Tensor:
        """The shares of fewer principal components; what was not measured for these two numbers counts as nothing."""
        n, known = max(n_in, n_out), max(n_in, n_out)
        for count, own in ((n_in, len(self.singular_values_in)), (n_out, len(self.singular_values_out))):
            known = min(known, count) if count < own else known
        shares = self.explained_variance_ratio[:n]
        return shares if known == n else torch.cat([shares[:known], torch.zeros_like(shares[known:])])
