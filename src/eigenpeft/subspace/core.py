"""An adapter's place in the bases of one module: a core of one of the kinds in `cores.py`, and its scaling."""

from dataclasses import dataclass

from torch import Tensor

from eigenpeft.errors import SubspaceError
from eigenpeft.subspace.cores import CORES, CoreKind, Parts, core_kind


@dataclass(frozen=True, eq=False)
class Core:
    """An adapter's place in the bases of one module: `ΔW ≈ V_outᵀ M V_in` with `M = scaling · M(parts)`.

    V_out is (K_out, out_features), V_in (K_in, in_features) and M (K_out, K_in); with the core "low_rank" `M = C_out
    C_in`, which are the coefficients of EigenLoRAx (arXiv 2502.04700, section 3). The parts are kept as they were
    trained, and the scaling beside them, so that an adapter comes out as it went in, bit for bit. `factors` and `dense`
    have the scaling in them.

    Attributes:
        kind: Name of a row of `CORES`.
        parts: Tensors by the names that they have in adapter files.
        scaling: `s = lora_alpha / r`, or 1 where it is folded into the parts.

    Raises:
        SubspaceError: If the kind is unknown, or the parts are not those of the kind or do not fit each other.

    Examples:
        >>> import torch
        >>> core = Core("diagonal", {"coefficients_out": torch.tensor([1.0, 2.0])}, scaling=0.5)
        >>> core.dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]])
    """

    kind: str
    parts: Parts
    scaling: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "kind", core_kind(self.kind, from_file=True).name)
        object.__setattr__(self, "parts", dict(self.parts))
        found = {name: tuple(tensor.shape) for name, tensor in self.parts.items()}
        try:
            n_components_in, n_components_out, rank = self.row.sizes(self.parts)
            fits = found == self.row.shapes(
                n_components_in=n_components_in, n_components_out=n_components_out, rank=rank
            )
        except (KeyError, IndexError, TypeError, ValueError):
            fits = False
        if not fits:
            expected = self.row.shapes(n_components_in=1, n_components_out=1, rank=1)
            raise SubspaceError(
                f"A core of kind {self.kind!r} has the parts {', '.join(expected)}, with {len(expected)} shapes that fit "
                f"each other as subspace/cores.py defines; got {found}."
            )

    @property
    def row(self) -> CoreKind:
        """The row of `CORES`."""
        return CORES[self.kind]

    @property
    def n_components_in(self) -> int:
        """K_in, components of the input side."""
        return self.row.sizes(self.parts)[0]

    @property
    def n_components_out(self) -> int:
        """K_out, components of the output side."""
        return self.row.sizes(self.parts)[1]

    @property
    def n_bytes(self) -> int:
        """Size of the parts in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.parts.values())

    @property
    def coefficients_out(self) -> Tensor:
        """C_out (K_out, q) of `factors`."""
        return self.factors()[0]

    @property
    def coefficients_in(self) -> Tensor:
        """C_in (q, K_in) of `factors`."""
        return self.factors()[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        """`(C_out (K_out, q), C_in (q, K_in))` with `C_out C_in = M`, the scaling in C_out."""
        left, right = self.row.to_factors(self.parts)
        return (left if self.scaling == 1.0 else left * self.scaling), right

    def dense(self) -> Tensor:
        """M (K_out, K_in), the scaling included."""
        dense = self.row.to_dense(self.parts)
        return dense if self.scaling == 1.0 else dense * self.scaling

    def to(self, kind: str, *, rank: int | None = None) -> "Core":
        """The nearest core of another kind, its scaling folded into the parts.

        Args:
            kind: Name of a row of `CORES`.
            rank: r of "low_rank"; None keeps this core's own factors.

        Raises:
            SubspaceError: If there is no such kind, or it is not defined for these numbers of components.
            ValueError: If `rank` is less than 1.

        Examples:
            >>> import torch
            >>> Core("diagonal", {"coefficients_out": torch.tensor([1.0, 2.0])}).to("full").parts["coefficients_out"]
            tensor([[1., 0.],
                    [0., 2.]])
        """
        row = core_kind(kind, stacklevel=3)
        return Core(row.name, row.from_factors(*self.factors(), rank=rank))


class Coefficients(Core):
    """The core "low_rank" from its two parts: `ΔW ≈ V_outᵀ C_out C_in V_in`, the scaling folded in.

    Args:
        coefficients_out: C_out, (K_out, r).
        coefficients_in: C_in, (r, K_in).

    Raises:
        SubspaceError: If the parts do not fit each other.
    """

    def __init__(self, coefficients_out: Tensor, coefficients_in: Tensor):
        super().__init__("low_rank", {"coefficients_in": coefficients_in, "coefficients_out": coefficients_out})
