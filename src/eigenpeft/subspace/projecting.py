"""An update's place in a bank: the core whose update is nearest."""

from torch import Tensor

from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.bases.paired import pair_coefficients
from eigenpeft.linalg.coefficients import project
from eigenpeft.linalg.factored import difference_norm
from eigenpeft.subspace.core import Coefficients, Core
from eigenpeft.subspace.module import ModuleSubspace


def place(module: str, *, bank: ModuleSubspace | None, lora_B: Tensor, lora_A: Tensor) -> Core:
    """The core whose update is nearest: `Coefficients` on orthonormal components, a diagonal core on paired directions.

    Args:
        module: Name of the module, for messages.
        bank: Its bases; None where the subspace has none.
        lora_B: (out_features, r), scaling included.
        lora_A: (r, in_features).

    Raises:
        SubspaceError: If there are no bases, or they have another shape.
    """
    if bank is None or (len(lora_B), lora_A.shape[1]) != (bank.out_features, bank.in_features):
        has = "not in the subspace" if bank is None else f"{bank.out_features} x {bank.in_features} in the subspace"
        raise SubspaceError(
            f"Cannot project {module!r} of shape {len(lora_B)} x {lora_A.shape[1]}: it is {has}. "
            "Use adapters of the same base model, or build the subspace from a collection with this module."
        )
    if bank.paired:
        return paired_core(lora_B, lora_A, bank=bank)[0]
    sides = project(lora_B, lora_A, components_out=bank.components_out, components_in=bank.components_in)
    return Coefficients(*sides)


def paired_core(lora_B: Tensor, lora_A: Tensor, *, bank: ModuleSubspace) -> tuple[Core, float]:
    """The diagonal core whose update is nearest, and ‖ΔW - P_outᵀ diag(d) P_in‖ in the Frobenius norm.

    Args:
        lora_B: (out_features, r), scaling included.
        lora_A: (r, in_features).
        bank: Paired directions.
    """
    components_out, components_in = bank.components_out, bank.components_in
    diagonal = pair_coefficients(lora_B, lora_A, components_out=components_out, components_in=components_in).to(
        components_out.dtype
    )
    missed = difference_norm(lora_B, lora_A, other_B=components_out.mT * diagonal, other_A=components_in)
    return Core("diagonal", {"coefficients_out": diagonal}), float(missed)
