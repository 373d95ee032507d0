"""The subspace of one adapted weight."""

from dataclasses import dataclass

from torch import Tensor

from eigenpeft.errors import SubspaceError

# The tensors of one module, in the order in which files and fingerprints list them.
TENSOR_FIELDS = (
    "components_in",
    "components_out",
    "singular_values_in",
    "singular_values_out",
    "explained_variance_ratio",
)


@dataclass(frozen=True, eq=False)
class ModuleSubspace:
    """The subspace of one adapted weight of shape (out_features, in_features).

    Attributes:
        components_in: (n_components, in_features), orthonormal rows, most important first; pseudo-components last.
        components_out: (n_components, out_features), likewise.
        singular_values_in: (n_components - n_pseudo_components,), of the stack the input side was
            fitted to, descending.
        singular_values_out: The same for the output side.
        explained_variance_ratio: (n_components - n_pseudo_components,), entry k is what component k + 1, on both sides
            together, adds to the explained share of the adapters' squared ΔW norms; `cumsum` gives the curve.
    """

    components_in: Tensor
    components_out: Tensor
    singular_values_in: Tensor
    singular_values_out: Tensor
    explained_variance_ratio: Tensor

    def __post_init__(self):
        n_components, n_principal = len(self.components_in), len(self.explained_variance_ratio)
        if self.components_in.ndim != 2 or self.components_out.ndim != 2 or len(self.components_out) != n_components:
            raise SubspaceError(
                f"components_in {tuple(self.components_in.shape)} and components_out "
                f"{tuple(self.components_out.shape)} must be matrices with one row a component and the "
                "same number of rows."
            )
        spectra = [tuple(values.shape) for values in (self.singular_values_in, self.singular_values_out)]
        if n_principal > n_components or any(shape != (n_principal,) for shape in spectra):
            raise SubspaceError(
                f"singular_values_in {spectra[0]}, singular_values_out {spectra[1]} and explained_variance_ratio "
                f"({n_principal},) must have one entry a principal component, at most the {n_components} components."
            )

    @property
    def n_components(self) -> int:
        """Number of components K of each side, pseudo-components included."""
        return len(self.components_in)

    @property
    def n_pseudo_components(self) -> int:
        """How many of the last components are random directions rather than principal ones."""
        return len(self.components_in) - len(self.explained_variance_ratio)

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

    def truncate(self, n_components: int) -> "ModuleSubspace":
        """The subspace of the first `n_components` components; views, no copies.

        Args:
            n_components: Between 1 and the present number.

        Raises:
            SubspaceError: If there are fewer components than asked for.
        """
        if not 1 <= n_components <= self.n_components:
            raise SubspaceError(
                f"n_components={n_components} must be between 1 and the {self.n_components} components of the "
                "subspace; build it again with a larger n_components to have more."
            )
        return ModuleSubspace(**{name: getattr(self, name)[:n_components] for name in TENSOR_FIELDS})

    def tensors(self) -> dict[str, Tensor]:
        """The module's tensors by field name."""
        return {name: getattr(self, name) for name in TENSOR_FIELDS}
