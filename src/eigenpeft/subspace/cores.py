"""The kinds of core `M` in `ΔW = V_outᵀ M V_in`, as one table: shapes, numbers of parameters, starts and conversions.

What depends on the kind is asked of its row; no other file asks `if core == "..."`.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.factored import truncate

Parts = Mapping[str, Tensor]
"""The tensors of one core by the names that they have in adapter files."""
Init = bool | Literal["gaussian"]
"""As LoRA's `init_lora_weights`: True, "gaussian", or False for random numbers on both sides (`ΔW` is not zero)."""


class CoreKind(ABC):
    """One row of `CORES`. All its methods are pure functions of tensors.

    Attributes:
        name: What `EigenLoraConfig(core=...)` and files call it.
        trained: Names of the parts that training changes; the others are frozen.
        is_factored: Whether M is a product of two parts, so that r is a size of its own.
        is_matrix: Whether the output side has two axes; otherwise it is the diagonal of a square M.
        weighs_sources: Whether M is made of the cores of other adapters.

    Examples:
        >>> (
        ...     isinstance(CORES["full"], CoreKind),
        ...     CORES["full"].shapes(n_components_in=3, n_components_out=2, rank=1),
        ...     CORES["full"].n_parameters(n_components_in=3, n_components_out=2, rank=1),
        ... )
        (True, {'coefficients_out': (2, 3)}, 6)
    """

    name: ClassVar[str]
    trained: ClassVar[tuple[str, ...]] = ("coefficients_out",)
    is_factored: ClassVar[bool] = False
    is_matrix: ClassVar[bool] = True
    weighs_sources: ClassVar[bool] = False

    @abstractmethod
    def shapes(self, *, n_components_in: int, n_components_out: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shape of each part.

        Args:
            n_components_in: K_in, components of the input side.
            n_components_out: K_out, components of the output side.
            rank: r of "low_rank"; the number of frozen cores of "mixture"; without meaning for the others.

        Raises:
            SubspaceError: If the core is not defined for these numbers.
        """

    @abstractmethod
    def sizes(self, parts: Parts) -> tuple[int, int, int]:
        """The arguments `(n_components_in, n_components_out, rank)` of `shapes` that fit some parts.

        Args:
            parts: Tensors by name.
        """

    @abstractmethod
    def to_dense(self, parts: Parts) -> Tensor:
        """M (K_out, K_in).

        Args:
            parts: Tensors by name.
        """

    @abstractmethod
    def from_factors(
        self, coefficients_out: Tensor, coefficients_in: Tensor, *, rank: int | None = None
    ) -> dict[str, Tensor]:
        """The parts whose M is nearest to `C_out C_in` in the Frobenius norm.

        On orthonormal components that is also the nearest update.

        Args:
            coefficients_out: C_out, (K_out, q).
            coefficients_in: C_in, (q, K_in).
            rank: r of the result for "low_rank", filled with zeros where q is smaller; None keeps the factors as they
                are. The other cores have no rank of their own.

        Raises:
            SubspaceError: If the core is not defined for these numbers of components.
            ValueError: If `rank` is less than 1.
        """

    def to_factors(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """`(C_out (K_out, q), C_in (q, K_in))` with `C_out C_in = M`, without a decomposition.

        Args:
            parts: Tensors by name.

        Returns:
            For "low_rank" its own parts, q = r; for the others M and an identity, q = min(K_out, K_in).
        """
        dense = self.to_dense(parts)
        n_components_out, n_components_in = dense.shape
        identity = torch.eye(min(n_components_out, n_components_in), dtype=dense.dtype, device=dense.device)
        return (dense, identity) if n_components_in <= n_components_out else (identity, dense)

    def moved(self, parts: Parts, *, left: Tensor, right: Tensor) -> dict[str, Tensor] | None:
        """The parts of `L M R` (`linalg.coefficients.change_of_bases`); None where that is not of this kind.

        Args:
            parts: Tensors by name.
            left: L, (K'_out, K_out).
            right: R, (K_in, K'_in).
        """
        return {"coefficients_out": left @ parts["coefficients_out"] @ right}

    def n_parameters(self, *, n_components_in: int, n_components_out: int, rank: int) -> int:
        """How many numbers are trained in one module.

        Args:
            n_components_in: K_in.
            n_components_out: K_out.
            rank: As in `shapes`.
        """
        shapes = self.shapes(n_components_in=n_components_in, n_components_out=n_components_out, rank=rank)
        return sum(math.prod(shapes[part]) for part in self.trained)

    def start(
        self,
        *,
        n_components_in: int,
        n_components_out: int,
        rank: int,
        init: Init = True,
        zero_side: str = "out",
        scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """The parts of the start `ΔW = 0`, from torch's global generator as PEFT's own starts are.

        Only one side is zero: with zeros on both sides no gradient would ever flow (a saddle).

        Args:
            n_components_in: K_in.
            n_components_out: K_out.
            rank: As in `shapes`.
            init: As LoRA's `init_lora_weights`.
            zero_side: Side of the factored core that starts at zero: "out" as LoRA does for linear layers, "in" as it does
                for embeddings. Cores of one part start at zero there.
            scale: Standard deviation of the other side where `zero_side` is "in".

        Raises:
            SubspaceError: As `shapes`.
        """
        shapes = self.shapes(n_components_in=n_components_in, n_components_out=n_components_out, rank=rank)
        shape = shapes["coefficients_out"]
        return {"coefficients_out": torch.zeros(shape) if init is not False else _uniform(shape)}


class _LowRank(CoreKind):
    """`M = C_out C_in` (EigenLoRAx, arXiv 2502.04700, section 3)."""

    name = "low_rank"
    trained = ("coefficients_in", "coefficients_out")
    is_factored = True

    def shapes(self, *, n_components_in: int, n_components_out: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"coefficients_in": (rank, n_components_in), "coefficients_out": (n_components_out, rank)}

    def sizes(self, parts: Parts) -> tuple[int, int, int]:
        return parts["coefficients_in"].shape[1], len(parts["coefficients_out"]), len(parts["coefficients_in"])

    def to_dense(self, parts: Parts) -> Tensor:
        return parts["coefficients_out"] @ parts["coefficients_in"]

    def to_factors(self, parts: Parts) -> tuple[Tensor, Tensor]:
        return parts["coefficients_out"], parts["coefficients_in"]

    def from_factors(
        self, coefficients_out: Tensor, coefficients_in: Tensor, *, rank: int | None = None
    ) -> dict[str, Tensor]:
        if rank is not None:
            coefficients_out, coefficients_in = truncate(coefficients_out, coefficients_in, rank=rank)
        return {"coefficients_in": coefficients_in, "coefficients_out": coefficients_out}

    def moved(self, parts: Parts, *, left: Tensor, right: Tensor) -> dict[str, Tensor] | None:
        return {
            "coefficients_in": parts["coefficients_in"] @ right,
            "coefficients_out": left @ parts["coefficients_out"],
        }

    def start(
        self,
        *,
        n_components_in: int,
        n_components_out: int,
        rank: int,
        init: Init = True,
        zero_side: str = "out",
        scale: float = 1.0,
    ) -> dict[str, Tensor]:
        shapes = self.shapes(n_components_in=n_components_in, n_components_out=n_components_out, rank=rank)
        if zero_side == "in":
            left = torch.zeros(shapes["coefficients_in"]) if init is not False else torch.randn(rank, n_components_in)
            return {"coefficients_in": left, "coefficients_out": scale * torch.randn(n_components_out, rank)}
        # As LoRA starts A: the rows of A = C_in V_in get the norm that LoRA's rows have, V_in being orthonormal.
        coefficients_in = nn.init.kaiming_uniform_(torch.empty(shapes["coefficients_in"]), a=math.sqrt(5))
        if init == "gaussian":
            nn.init.normal_(coefficients_in, std=1 / rank)
        return {"coefficients_in": coefficients_in} | super().start(
            n_components_in=n_components_in, n_components_out=n_components_out, rank=rank, init=init
        )


class _Full(CoreKind):
    """All entries of M: LoRA-XS' `B R A` (arXiv 2405.17604) and MoSLoRA's mixer (arXiv 2406.11909, equation 3) on a subspace."""

    name = "full"

    def shapes(self, *, n_components_in: int, n_components_out: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"coefficients_out": (n_components_out, n_components_in)}

    def sizes(self, parts: Parts) -> tuple[int, int, int]:
        n_components_out, n_components_in = parts["coefficients_out"].shape
        return n_components_in, n_components_out, min(n_components_in, n_components_out)

    def to_dense(self, parts: Parts) -> Tensor:
        return parts["coefficients_out"]

    def from_factors(
        self, coefficients_out: Tensor, coefficients_in: Tensor, *, rank: int | None = None
    ) -> dict[str, Tensor]:
        return {"coefficients_out": coefficients_out @ coefficients_in}


class _Diagonal(CoreKind):
    """`M = diag(d)`: the scaling of JD-Diag ("Compress then Serve", arXiv 2407.00066, appendix A.1, case 2)."""

    name = "diagonal"
    is_matrix = False

    def shapes(self, *, n_components_in: int, n_components_out: int, rank: int) -> dict[str, tuple[int, ...]]:
        if n_components_in != n_components_out:
            raise SubspaceError(
                f"core='diagonal' pairs each component of the input with one of the output, and there are {n_components_in} and "
                f"{n_components_out}; use core='full' or core='low_rank', or bases with equal numbers of components."
            )
        return {"coefficients_out": (n_components_out,)}

    def sizes(self, parts: Parts) -> tuple[int, int, int]:
        n = len(parts["coefficients_out"])
        return n, n, n

    def to_dense(self, parts: Parts) -> Tensor:
        return torch.diag(parts["coefficients_out"])

    def from_factors(
        self, coefficients_out: Tensor, coefficients_in: Tensor, *, rank: int | None = None
    ) -> dict[str, Tensor]:
        self.shapes(n_components_in=coefficients_in.shape[1], n_components_out=len(coefficients_out), rank=1)
        return {"coefficients_out": (coefficients_out * coefficients_in.mT).sum(dim=1)}

    def moved(self, parts: Parts, *, left: Tensor, right: Tensor) -> dict[str, Tensor] | None:
        if not (_only_adds(left) and _only_adds(right.mT) and len(left) == right.shape[1]):
            return None
        diagonal = parts["coefficients_out"]
        return {"coefficients_out": nn.functional.pad(diagonal, (0, len(left) - len(diagonal)))}


class _Mixture(CoreKind):
    """`M = Σ_t w_t M_t` of frozen cores, a trained weight per core: learnable concatenation (CAT; LoRA Soups, arXiv 2410.13025)."""

    name = "mixture"
    trained = ("weights",)
    weighs_sources = True

    def shapes(self, *, n_components_in: int, n_components_out: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"weights": (rank,), "cores": (rank, n_components_out, n_components_in)}

    def sizes(self, parts: Parts) -> tuple[int, int, int]:
        n_cores, n_components_out, n_components_in = parts["cores"].shape
        return n_components_in, n_components_out, n_cores

    def to_dense(self, parts: Parts) -> Tensor:
        return torch.einsum("t,tij->ij", parts["weights"], parts["cores"])

    def from_factors(
        self, coefficients_out: Tensor, coefficients_in: Tensor, *, rank: int | None = None
    ) -> dict[str, Tensor]:
        dense = coefficients_out @ coefficients_in
        return {"weights": dense.new_ones(1), "cores": dense[None]}

    def moved(self, parts: Parts, *, left: Tensor, right: Tensor) -> dict[str, Tensor] | None:
        return {"weights": parts["weights"], "cores": torch.einsum("ij,tjk,kl->til", left, parts["cores"], right)}

    def start(
        self,
        *,
        n_components_in: int,
        n_components_out: int,
        rank: int,
        init: Init = True,
        zero_side: str = "out",
        scale: float = 1.0,
    ) -> dict[str, Tensor]:
        raise SubspaceError(
            "core='mixture' has no start of its own: it weighs cores that exist already. Make it from members of a store."
        )


CORES: dict[str, CoreKind] = {row.name: row for row in (_LowRank(), _Full(), _Diagonal(), _Mixture())}
"""The kinds of core by name."""
FROM_ZERO: tuple[str, ...] = ("low_rank", "full", "diagonal")
"""Those that an adapter can be trained in from `ΔW = 0`, without other adapters."""
RENAMED = {"mixer": "full"}
"""Old names of cores."""


def core_kind(name: str, *, from_file: bool = False, stacklevel: int = 2) -> CoreKind:
    """The row of a name; "mixer", the old name of "full", is read as that.

    Args:
        name: Name of the core.
        from_file: Whether a file says it, and no user could change it: then the old name is read without a warning.
        stacklevel: Stack level of the `DeprecationWarning`, as `warnings.warn` takes it, seen from the caller.

    Raises:
        SubspaceError: If there is no such core.

    Examples:
        >>> core_kind("low_rank").n_parameters(n_components_in=16, n_components_out=16, rank=4)
        128
    """
    if name in RENAMED:
        if not from_file:
            warnings.warn(
                f"core={name!r} is deprecated and goes away in the next minor version; use core={RENAMED[name]!r}, the "
                "same under another name.",
                DeprecationWarning,
                stacklevel=stacklevel,
            )
        name = RENAMED[name]
    if name not in CORES:
        raise SubspaceError(f"core={name!r} must be one of {', '.join(map(repr, CORES))}.")
    return CORES[name]


def _only_adds(change: Tensor) -> bool:
    """Whether new components are the old ones and more behind them: the change of basis is an identity over zeros."""
    identity = torch.eye(*change.shape, dtype=change.dtype, device=change.device)
    return len(change) >= change.shape[1] and bool(torch.allclose(change, identity, rtol=0, atol=1e-6))


def _uniform(shape: tuple[int, ...]) -> Tensor:
    # LoRA's own B without a start is that of a linear layer; the fan-in of ours is the last axis too.
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound)
