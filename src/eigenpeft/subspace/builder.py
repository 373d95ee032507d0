"""From a collection of adapters to its principal subspace, one module at a time."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from eigenpeft.collection.diagnosis import Diagnosis, Finding
from eigenpeft.collection.reader import AdapterCollection, AdapterFactors
from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.fitting import (
    METHODS,
    WEIGHTINGS,
    FittedBases,
    Method,
    Weighting,
    explained_share_curve,
    fit_bases,
    stack_rows,
)
from eigenpeft.linalg.incremental import merge_components
from eigenpeft.linalg.orthogonal import random_complement
from eigenpeft.subspace.info import SubspaceInfo
from eigenpeft.subspace.principal import ModuleSubspace, PrincipalSubspace

logger = logging.getLogger(__name__)

# Methods whose bases are the leading singular vectors of one growing stack of rows, so that a new adapter's rows can be
# merged without reading the old ones. HOOI refines against all adapters at once; EigenLoRAx moves its mean.
_MERGEABLE = ("balanced", "hosvd")


class SubspaceBuilder:
    """Fits a `PrincipalSubspace` to the adapters of an `AdapterCollection`.

    Modules are fitted one after another and only one module's factors are in memory. The same adapters and seed give
    the same subspace, sign included, whatever the order of the modules.

    Args:
        n_components: Components K of every module and side: a number; or a share in (0, 1], which takes for each module
            the fewest components that explain this share of Σ‖ΔW_i‖²; or either of them by module, as a mapping from
            `fnmatch` patterns ("*.query") to values, of which the first that fits counts. Defaults to 32, the paper's.
        method: What is decomposed. "balanced" (default): rows of the balanced factors of each ΔW_i, which depend on
            ΔW_i alone. "hosvd": the second moments of the ΔW_i. "hooi": "hosvd", then refined for the least ΔW error.
            "eigenlorax": the raw rows of all A_i and all B_iᵀ, centred, as Algorithm 1 of arXiv 2502.04700 has it.
        weighting: "equal" (default) scales every adapter's update of a module to unit Frobenius norm, so that one
            diverged adapter cannot own the subspace; "energy" takes the updates as they are.
        n_pseudo_components: Random directions added to each module, orthonormal to the principal ones (the paper's
            augmentation for collections of few adapters).
        seed: Seed of the random directions and of the iterative solver's start.
        tol: Tolerance of the iterative solver, the relative error of what it captures.

    Attributes:
        subspace_: The fitted `PrincipalSubspace`.
        findings_: What was noticed about the adapters: untrained ones, outliers, shared starts.

    Examples:
        >>> from eigenpeft import AdapterCollection, SubspaceBuilder
        >>> collection = AdapterCollection.from_pretrained(adapters)  # doctest: +SKIP
        >>> subspace = SubspaceBuilder(n_components=16).fit(collection).subspace_  # doctest: +SKIP
        >>> subspace.save_pretrained("my-subspace")  # doctest: +SKIP
    """

    subspace_: PrincipalSubspace
    findings_: tuple[Finding, ...]

    def __init__(
        self,
        n_components: int | float | Mapping[str, int | float] = 32,
        *,
        method: Method = "balanced",
        weighting: Weighting = "equal",
        n_pseudo_components: int = 0,
        seed: int = 0,
        tol: float = 1e-4,
    ):
        self.n_components = n_components
        self.method: Method = method
        self.weighting: Weighting = weighting
        self.n_pseudo_components = n_pseudo_components
        self.seed = seed
        self.tol = tol
        self._seen: list[AdapterCollection] = []

    @classmethod
    def from_subspace(cls, subspace: PrincipalSubspace) -> "SubspaceBuilder":
        """A builder that goes on from a saved subspace: `from_subspace(subspace).partial_fit(new_adapters)`.

        Args:
            subspace: As `fit` made it, possibly loaded from disk.
        """
        info = subspace.info
        builder = cls(
            32 if info.n_components is None else info.n_components,
            method=info.method,  # pyright: ignore[reportArgumentType] (checked when used)
            weighting=info.weighting,  # pyright: ignore[reportArgumentType]
            n_pseudo_components=info.n_pseudo_components,
            seed=info.seed,
        )
        builder.subspace_, builder.findings_ = subspace, ()
        return builder

    def fit(self, collection: AdapterCollection) -> "SubspaceBuilder":
        """Fit to the adapters of `collection`, forgetting what was fitted before.

        Args:
            collection: At least one adapter with an update that is not zero.

        Returns:
            The builder itself, with `subspace_` and `findings_` set.

        Raises:
            SubspaceError: If an argument is out of range, or a module has fewer independent directions than
                `n_components`; one message names all such modules.
            CollectionError: If a tensor cannot be read or is not finite.
        """
        self._check_arguments()
        diagnosis, modules, problems = Diagnosis(), {}, []
        for module in tqdm(collection.modules, desc="Fitting", unit="module"):
            factors = collection.factors(module)
            diagnosis.observe(module, factors)
            try:
                modules[module] = self._fit_module(module, factors)
            except ValueError as error:
                problems.append(f"{module}: {error}")
        if problems:
            raise SubspaceError(_summarise(problems, n_modules=len(collection.modules)))
        self._seen = [collection]
        self.findings_ = (*collection.findings, *diagnosis.findings())
        self.subspace_ = PrincipalSubspace(
            modules,
            info=SubspaceInfo(
                base_model_name_or_path=collection.base_model_name_or_path,
                method=self.method,
                weighting=self.weighting,
                n_components=dict(self.n_components) if isinstance(self.n_components, Mapping) else self.n_components,
                n_pseudo_components=self.n_pseudo_components,
                seed=self.seed,
                sources=tuple(adapter.record() for adapter in collection.adapters),
                measured_on=collection.names,
                fan_in_fan_out=tuple(module for module in collection.modules if collection.fan_in_fan_out(module)),
            ),
        )
        return self

    def partial_fit(self, collection: AdapterCollection) -> "SubspaceBuilder":
        """Add adapters of any rank to the fitted subspace; the number of components of a module stays as it is.

        The old components, scaled by their singular values, stand for the old adapters, so that these are not read
        again and directions that were left out before stay left out (`fit` on all adapters has them). The explained
        shares are measured on all adapters this builder has seen; after `from_subspace`, on the added ones alone.

        Args:
            collection: New adapters, none of them in the subspace yet.

        Returns:
            The builder itself.

        Raises:
            SubspaceError: If the method cannot be updated, a name is already taken, or shapes differ.
        """
        if not hasattr(self, "subspace_"):
            return self.fit(collection)
        self._check_arguments()
        self._check_addition(collection)
        old, seen = self.subspace_, [*self._seen, collection]
        modules, problems, diagnosis = dict(old), [], Diagnosis()
        names = {module: old.find(module) or module for module in collection.modules}
        for module, name in tqdm(names.items(), desc="Updating", unit="module"):
            factors = collection.factors(module)
            diagnosis.observe(name, factors)
            known = [other.factors(module) for other in self._seen if module in other.modules]
            try:
                if name in old:
                    modules[name] = self._update_module(name, factors, measured_on=[*sum(known, []), *factors])
                else:
                    modules[name] = self._fit_module(name, factors)
            except ValueError as error:
                problems.append(f"{name}: {error}")
        if problems:
            raise SubspaceError(_summarise(problems, n_modules=len(names)))
        self._seen, self.findings_ = seen, (*collection.findings, *diagnosis.findings())
        self.subspace_ = PrincipalSubspace(
            modules,
            info=replace(
                old.info,
                sources=(*old.info.sources, *(adapter.record() for adapter in collection.adapters)),
                measured_on=tuple(name for other in seen for name in other.names),
            ),
        )
        return self

    def _check_arguments(self) -> None:
        if self.method not in METHODS:
            raise SubspaceError(f"method={self.method!r} must be one of {', '.join(map(repr, METHODS))}.")
        if self.weighting not in WEIGHTINGS:
            raise SubspaceError(f"weighting={self.weighting!r} must be one of {', '.join(map(repr, WEIGHTINGS))}.")
        values = self.n_components.values() if isinstance(self.n_components, Mapping) else [self.n_components]
        for value in values:
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and not (isinstance(value, float) and 0 < value <= 1):
                raise SubspaceError(
                    f"n_components={value!r} must be a whole number of at least 1, or a share between 0 and 1 of the "
                    "adapters' squared norms to explain."
                )
        if not isinstance(self.n_pseudo_components, int) or self.n_pseudo_components < 0:
            raise SubspaceError(
                f"n_pseudo_components={self.n_pseudo_components!r} must be a whole number of at least 0."
            )

    def _check_addition(self, collection: AdapterCollection) -> None:
        if self.method not in _MERGEABLE:
            raise SubspaceError(
                f"method={self.method!r} cannot be updated, only {', '.join(map(repr, _MERGEABLE))} can: "
                "call fit with all adapters, or build with one of those."
            )
        taken = sorted({str(source["name"]) for source in self.subspace_.info.sources} & set(collection.names))
        if taken:
            raise SubspaceError(
                f"Already in the subspace: {', '.join(map(repr, taken))}. Pass new adapters only, or rename them."
            )

    def _n_components_of(self, module: str) -> int | float:
        if not isinstance(self.n_components, Mapping):
            return self.n_components
        for pattern, value in self.n_components.items():
            if fnmatchcase(module, pattern):
                return value
        raise ValueError(
            f"no pattern of n_components fits it; the patterns are {list(self.n_components)}. Add one, such as '*'."
        )

    def _fit_module(self, module: str, factors: Sequence[AdapterFactors]) -> ModuleSubspace:
        fitted = fit_bases(
            _pairs(factors),
            n_components=self._n_components_of(module),
            method=self.method,
            weighting=self.weighting,
            tol=self.tol,
            generator=seeded_generator(self.seed, module, "solver"),
        )
        return self._with_pseudo_components(module, fitted)

    def _update_module(
        self, module: str, factors: Sequence[AdapterFactors], *, measured_on: Sequence[AdapterFactors]
    ) -> ModuleSubspace:
        bases = self.subspace_[module]
        n_principal = bases.n_components - bases.n_pseudo_components
        merged = [
            merge_components(components[:n_principal], values, rows, n_components=n_principal)
            for components, values, rows in zip(
                (bases.components_in, bases.components_out),
                (bases.singular_values_in, bases.singular_values_out),
                stack_rows(_pairs(factors), method=self.method, weighting=self.weighting),
                strict=True,
            )
        ]
        curve = explained_share_curve(
            _pairs(measured_on), merged[0].components, merged[1].components, weighting=self.weighting
        )
        fitted = FittedBases(
            components_in=merged[0].components,
            components_out=merged[1].components,
            singular_values_in=merged[0].singular_values,
            singular_values_out=merged[1].singular_values,
            explained_variance_ratio=torch.diff(curve, prepend=curve.new_zeros(1)),
        )
        return self._with_pseudo_components(module, fitted)

    def _with_pseudo_components(self, module: str, fitted: FittedBases) -> ModuleSubspace:
        sides = {"in": fitted.components_in, "out": fitted.components_out}
        if self.n_pseudo_components:
            for side, components in sides.items():
                extra = random_complement(
                    components,
                    n_extra=self.n_pseudo_components,
                    generator=seeded_generator(self.seed, module, side),
                )
                sides[side] = torch.cat([components, extra.to(components.dtype)])
        return ModuleSubspace(
            components_in=sides["in"].float(),
            components_out=sides["out"].float(),
            singular_values_in=fitted.singular_values_in.float(),
            singular_values_out=fitted.singular_values_out.float(),
            explained_variance_ratio=fitted.explained_variance_ratio.float(),
        )


def _pairs(factors: Sequence[AdapterFactors]) -> list[tuple[Tensor, Tensor]]:
    return [(adapter.lora_B, adapter.lora_A) for adapter in factors]


def seeded_generator(seed: int, module: str, purpose: str) -> torch.Generator:
    """A generator by module name, not by position: its numbers depend neither on other modules nor on their order.

    Args:
        seed: The user's.
        module: Module name.
        purpose: What the numbers are for, so that two uses never share them.
    """
    digest = hashlib.sha256(f"{seed}|{module}|{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _summarise(problems: Sequence[str], *, n_modules: int) -> str:
    shown = "\n".join(f"- {problem}" for problem in problems[:5])
    rest = f"\n- ... and {len(problems) - 5} more" if len(problems) > 5 else ""
    return f"{len(problems)} of {n_modules} modules cannot be fitted as asked:\n{shown}{rest}"
