"""Pure mathematics on tensors: no state, no logging, no files."""

from eigenpeft.linalg.bases.fitting import (
    METHODS,
    FittedBases,
    explained_share_curve,
    fit_bases,
    stack_rows,
)
from eigenpeft.linalg.bases.incremental import Merged, merge_components
from eigenpeft.linalg.bases.stacking import WEIGHTINGS, Factors, FactorStream
from eigenpeft.linalg.coefficients import project, reconstruct
from eigenpeft.linalg.decompose import (
    Decomposition,
    full_spectrum,
    leading_components,
    numerical_rank,
)
from eigenpeft.linalg.factored import (
    FactoredSvd,
    balance,
    factored_svd,
    frobenius_norm,
    inner_product,
    projection_residual,
    truncate,
)
from eigenpeft.linalg.layer_update import (
    Route,
    choose_route,
    low_rank_update,
    low_rank_update_grad,
    low_rank_updates,
)
from eigenpeft.linalg.orthogonal import fix_signs, orthonormal_rows, principal_angles, random_complement

__all__ = [
    "METHODS",
    "WEIGHTINGS",
    "Decomposition",
    "FactoredSvd",
    "FactorStream",
    "Factors",
    "FittedBases",
    "Merged",
    "Route",
    "balance",
    "choose_route",
    "explained_share_curve",
    "factored_svd",
    "fit_bases",
    "fix_signs",
    "frobenius_norm",
    "full_spectrum",
    "inner_product",
    "leading_components",
    "low_rank_update",
    "low_rank_update_grad",
    "low_rank_updates",
    "merge_components",
    "numerical_rank",
    "orthonormal_rows",
    "principal_angles",
    "project",
    "projection_residual",
    "random_complement",
    "reconstruct",
    "stack_rows",
    "truncate",
]
