"""Cores moved from one pair of bases to another."""

from dataclasses import replace

from torch import Tensor

from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.coefficients import change_of_bases, reconstruct
from eigenpeft.linalg.factored import frobenius_norm, projection_residual
from eigenpeft.subspace.core import Core
from eigenpeft.subspace.module import ModuleSubspace
from eigenpeft.subspace.principal import PrincipalSubspace
from eigenpeft.subspace.projecting import paired_core
from eigenpeft.subspace.stores.member import AdapterMember


def move(core: Core, old: ModuleSubspace, new: ModuleSubspace) -> tuple[Core, float]:
    """The core in new bases whose update is nearest: `M' = (V'_out V_outᵀ) M (V_in V'_inᵀ)`, and what that loses.

    Exact while the old span lies in the new one, as when components were added; otherwise the orthogonal projection. (The merge
    phase of "Shared LoRA Subspaces", arXiv 2602.06043, does the same for each factor: `ε' = β'ᵀ β ε` with the columns of β as old
    and of β' as new bases and ε as coefficients.) In paired directions the nearest diagonal core.

    Args:
        core: Core in the old bases.
        old: Old bases of the module.
        new: New bases, with orthonormal components or paired directions.

    Returns:
        The core, of the same kind where that can be, else "full"; and ‖ΔW - ΔW'‖ / ‖ΔW‖ in the Frobenius norm.
    """
    old_out, old_in = old.components_out[: core.n_components_out], old.components_in[: core.n_components_in]
    dtype = new.components_out.dtype
    coefficients_out, coefficients_in = (side.to(dtype) for side in core.factors())
    lora_B, lora_A = reconstruct(coefficients_out, coefficients_in, components_out=old_out, components_in=old_in)
    norm = float(frobenius_norm(lora_B, lora_A))
    if new.paired:
        paired, residual = paired_core(lora_B, lora_A, bank=new)
        return paired, residual / norm if norm else 0.0
    left, right = change_of_bases(old_out=old_out, old_in=old_in, new_out=new.components_out, new_in=new.components_in)
    residual = projection_residual(lora_B, lora_A, components_out=new.components_out, components_in=new.components_in)
    return moved_core(core, left, right), float(residual) / norm if norm else 0.0


def move_member(member: AdapterMember, old: PrincipalSubspace, new: PrincipalSubspace) -> AdapterMember:
    """A member in new bases; what that loses is added to its relative errors, which are then upper bounds.

    Args:
        member: Member in the old bases.
        old: The old bases.
        new: The new ones.

    Raises:
        SubspaceError: If the new subspace lacks a module that the member adapts, or has it in another shape.
    """
    cores, errors = {}, {}
    for module, core in member.items():
        if module not in new or (new[module].in_features, new[module].out_features) != (
            old[module].in_features,
            old[module].out_features,
        ):
            raise SubspaceError(
                f"The new subspace has no bases of the same shape for {module!r}, which {member.record.get('name')!r} "
                "adapts. Use a subspace of the same base model and modules."
            )
        cores[module], error = move(core, old[module], new[module])
        before = member.relative_errors.get(module, 0.0)
        errors[module] = min(1.0, before + error)  # by the triangle inequality; the norm of a projection is no larger
    return replace(member, cores=cores, relative_errors=errors, subspace_sha256=None)


def moved_core(core: Core, left: Tensor, right: Tensor) -> Core:
    """The core `L M R`, of the same kind where that can be, else "full".

    Args:
        core: Core in the old bases.
        left: L, (K'_out, K_out), of `change_of_bases`.
        right: R, (K_in, K'_in).
    """
    parts = {name: tensor.to(left.dtype) for name, tensor in core.parts.items()}
    moved = core.row.moved(parts, left=left, right=right)
    if moved is not None:
        return Core(core.kind, moved, core.scaling)
    return Core("full", {"coefficients_out": left @ core.row.to_dense(parts) @ right}, core.scaling)
