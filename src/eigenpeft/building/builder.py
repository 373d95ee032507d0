"""From a collection of adapters to its principal subspace, one module at a time."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from eigenpeft.building.arguments import asked_components, check_arguments
from eigenpeft.building.choosing import independent_starts
from eigenpeft.building.findings import diagnose, fewer_components
from eigenpeft.building.module_fitter import AUTO, ModuleFitter
from eigenpeft.building.problems import cannot_be_fitted, first_of, memory_does_not_suffice
from eigenpeft.building.sharing import build_shared_subspace, group_of, refuse_unshared
from eigenpeft.building.team import Team, module_cost
from eigenpeft.building.work_folder import FittedModule, Shards
from eigenpeft.collection.diagnosis import Diagnosis, Finding
from eigenpeft.collection.reader import AdapterCollection
from eigenpeft.errors import CollectionError, SubspaceError, is_out_of_memory
from eigenpeft.linalg.bases.fitting import MERGEABLE, Method, Weighting
from eigenpeft.subspace.info import SubspaceInfo
from eigenpeft.subspace.principal import PrincipalSubspace
from eigenpeft.version import __version__

logger = logging.getLogger(__name__)


class SubspaceBuilder:
    """Fits a `PrincipalSubspace` to the adapters of an `AdapterCollection`.

    Modules are fitted one after another and only one module's factors are in memory. The same adapters and seed give
    the same subspace, sign included, whatever the order of the modules and the number of processes.

    Args:
        n_components: Components K of every module and side: a number; or a share in (0, 1], which takes for each module
            the fewest components that explain this share of Σ‖ΔW_i‖²; or "auto", the number at which the others stop
            explaining more of a left-out adapter than chance (at most 64; see `audit`); or any of them by module, as a
            mapping from `fnmatch` patterns ("*.query") to values, of which the first that fits counts. None (default):
            32, as in the GLUE runs of EigenLoRAx (arXiv 2502.04700), or as many as a module has where that is fewer;
            `findings_` names such modules.
        method: What is decomposed. "balanced" (default): rows of the balanced factors of each ΔW_i, which depend on
            ΔW_i alone. "hosvd": the second moments of the ΔW_i. "hooi": "hosvd", then refined for the least ΔW error
            (JD-Full of arXiv 2407.00066, appendix A.1, case 1).
            "eigenlorax": the raw rows of all A_i and all B_iᵀ, centred, as Algorithm 1 of arXiv 2502.04700 has it. "paired":
            K pairs of directions for core="diagonal", of the least ΔW error with one number per adapter and pair (JD-Diag of
            arXiv 2407.00066, appendix A.1, case 2); their rows have unit norm and are not orthogonal, and n_components is a whole
            number.
        weighting: "equal" (default) scales every adapter's update of a module to unit Frobenius norm, so that one
            diverged adapter cannot own the subspace; "none" takes the updates as they are.
        n_pseudo_components: Random directions added to each module, orthonormal to the principal ones
            (EigenLoRAx's augmentation for collections of few adapters, see `random_complement`).
        seed: Seed of the random directions and of the iterative solver's start.
        tol: Tolerance of the iterative solver, the relative error of what it captures.
        memory_limit: Bytes that the tensors of one module may take while it is fitted; None (default) for no limit. Where
            the factors of all adapters do not fit, they are read in chunks and merged in a single pass that keeps 2 K
            directions ("balanced" and "hosvd", K a number). `subspace_.info.missed_share_bound` tells what that cost
            at most.
        share: None (default) for a bank per module; "layers" for one for all layers of a kind, or patterns of modules that share.

    Attributes:
        subspace_: The fitted `PrincipalSubspace`.
        findings_: What was noticed about the adapters: untrained ones, outliers, shared starts.

    Examples:
        >>> from eigenpeft import AdapterCollection, SubspaceBuilder
        >>> from eigenpeft.demo import shipped_adapters
        >>> collection = AdapterCollection.from_pretrained([shipped_adapters() / "cr", shipped_adapters() / "mr"])
        >>> subspace = SubspaceBuilder(n_components=4).fit(collection).subspace_
        >>> subspace[collection.modules[0]].n_components
        4
    """

    subspace_: PrincipalSubspace
    findings_: tuple[Finding, ...]

    def __init__(
        self,
        n_components: int | float | str | Mapping[str, int | float | str] | None = None,
        *,
        method: Method = "balanced",
        weighting: Weighting = "equal",
        n_pseudo_components: int = 0,
        seed: int = 0,
        tol: float = 1e-4,
        memory_limit: int | None = None,
        share: str | Sequence[str] | Callable[[str], str] | None = None,
    ):
        self.n_components = n_components
        self.method: Method = method
        self.weighting: Weighting = weighting
        self.n_pseudo_components = n_pseudo_components
        self.seed = seed
        self.tol = tol
        self.memory_limit = memory_limit
        self.share = share
        self._seen: list[AdapterCollection] = []
        self._shards: Shards | None = None

    @classmethod
    def from_subspace(cls, subspace: PrincipalSubspace) -> "SubspaceBuilder":
        """A builder that goes on from a saved subspace: `from_subspace(subspace).partial_fit(new_adapters)`.

        Args:
            subspace: As `fit` made it, possibly loaded from disk.
        """
        info = subspace.info
        builder = cls(
            info.n_components,
            method=info.method,  # pyright: ignore[reportArgumentType] (checked when used)
            weighting=info.weighting,  # pyright: ignore[reportArgumentType]
            n_pseudo_components=info.n_pseudo_components,
            seed=info.seed,
        )
        builder.subspace_, builder.findings_ = subspace, ()
        return builder

    def fit(
        self, collection: AdapterCollection, *, work_dir: str | Path | None = None, keep_work_dir: bool = False
    ) -> "SubspaceBuilder":
        """Fit to the adapters of `collection`, forgetting what was fitted before.

        Args:
            collection: At least one adapter with an update that is not zero.
            work_dir: Folder for finished modules, new or empty, removed at the end. With it an interrupted fit goes on where
                it stopped when it is called again, and the processes of a `torchrun` or `accelerate launch` share the
                modules among them (the folder must be one that all of them see). Without it nothing is written, and every
                process of a launch would do all the work. The result is the same in each case: a fit goes on only with the
                same settings and with adapters of the same contents.
            keep_work_dir: Leave the work folder for `remove_work_dir`, so that an interruption before the result is saved
                loses nothing.

        Returns:
            The builder itself, with `subspace_` and `findings_` set, in every process.

        Raises:
            SubspaceError: If an argument is out of range, a module has fewer independent directions than `n_components`
                (one message names all such modules), memory does not suffice for a module, or the work folder is another
                build's.
            CollectionError: If a tensor cannot be read or is not finite.
            ArtifactError: If the work folder holds other files or cannot be written.
            LostProcessError: If another process of the launch ended.
        """
        check_arguments(
            self.n_components,
            method=self.method,
            weighting=self.weighting,
            n_pseudo_components=self.n_pseudo_components,
            memory_limit=self.memory_limit,
        )
        if self.share is not None:
            return self._fit_shared(collection)
        team = Team() if work_dir is None else Team.of_this_launch()
        # Adapters are hashed for the record, shared out among the processes; the work folder's plan needs the hashes first.
        parts = team.gather(
            [(i, adapter.record()) for i, adapter in enumerate(collection.adapters) if i % team.size == team.rank],
            doing="hashing the adapters",
        )
        records = tuple(record for _, record in sorted(parts, key=lambda part: part[0]))
        shards = None
        if work_dir is not None:
            folders = tuple(Path(adapter.weights_path).parent for adapter in collection.adapters)
            shards = Shards(work_dir, self._plan(collection, records), inputs=folders)
        with nullcontext() if shards is None or not team.is_main else shards.only_writer():
            fitted = self._fit_modules(collection, team, shards)
        # Everybody has loaded all modules before anybody removes them.
        team.gather([], doing="reading the finished modules")
        self._shards = shards if team.is_main else None
        if not keep_work_dir:
            self.remove_work_dir()
        self._seen = [collection]
        fewer = () if self.n_components is not None else fewer_components(collection, fitted)
        self.findings_ = (*collection.findings, *fewer, *diagnose(collection, fitted))
        bounds = [module.missed_bound for module in fitted.values()]
        self.subspace_ = PrincipalSubspace(
            {name: module.bank for name, module in fitted.items()},
            info=SubspaceInfo(
                base_model_name_or_path=collection.base_model,
                base_model_revision=collection.base_model_revision,
                method=self.method,
                weighting=self.weighting,
                n_components=dict(self.n_components) if isinstance(self.n_components, Mapping) else self.n_components,
                n_pseudo_components=self.n_pseudo_components,
                seed=self.seed,
                sources=records,
                measured_on=collection.names,
                fan_in_fan_out=tuple(module for module in collection.modules if collection.fan_in_fan_out(module)),
                embeddings=tuple(module for module in collection.modules if collection.is_embedding(module)),
                missed_share_bound=max(bounds) if any(bounds) else None,
            ),
        )
        return self

    def _fit_shared(self, collection: AdapterCollection) -> "SubspaceBuilder":
        refuse_unshared(self.n_pseudo_components, self.memory_limit)
        settings = {"method": self.method, "weighting": self.weighting, "seed": self.seed, "tol": self.tol}
        self.subspace_ = build_shared_subspace(
            collection, n_components=self.n_components, kind_of=group_of(self.share), **settings
        )
        self._seen, self.findings_ = [collection], collection.findings
        return self

    def remove_work_dir(self) -> None:
        """Remove what `fit` wrote into its work folder, in the main process; nothing if that is done or there was none."""
        if self._shards is not None:
            self._shards.remove()
            self._shards = None

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
            SubspaceError: If an argument is out of range, the method cannot be updated, a name is already taken, shapes or numbers
                of components differ, modules share a basis, a pattern fits no module, a new module has fewer independent
                directions than it should get, or the memory does not suffice.
            CollectionError: If adapters cannot be read.
        """
        if not hasattr(self, "subspace_"):
            return self.fit(collection)
        check_arguments(
            self.n_components,
            method=self.method,
            weighting=self.weighting,
            n_pseudo_components=self.n_pseudo_components,
            memory_limit=self.memory_limit,
        )
        self._check_addition(collection)
        old, seen = self.subspace_, [*self._seen, collection]
        modules, problems, diagnosis = dict(old), [], Diagnosis()
        names = {module: old.find(module) or module for module in collection.modules}
        fitter = self._fitter(collection)
        for module, name in tqdm(names.items(), desc="Updating", unit="module"):
            factors = collection.factors(module)
            diagnosis.observe(name, factors=factors)
            known = [other.factors(module) for other in self._seen if module in other.modules]
            try:
                if name in old:
                    measured_on = [*sum(known, []), *factors]
                    modules[name] = fitter.update(name, old[name], factors, measured_on=measured_on)
                else:
                    modules[name] = fitter.fit(module, collection).bank
            except ValueError as error:
                problems.append(f"{name}: {error}")
        if problems:
            raise cannot_be_fitted(problems, n_modules=len(names))
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

    def _asked_components(self) -> list[int | float | str]:
        return asked_components(self.n_components)

    def _check_addition(self, collection: AdapterCollection) -> None:
        if self.method not in MERGEABLE:
            raise SubspaceError(
                f"method={self.method!r} cannot be updated, only {', '.join(map(repr, MERGEABLE))} can: "
                "call fit with all adapters, or build with one of those."
            )
        n_shared = len(self.subspace_) - len(self.subspace_.banks)
        if n_shared:
            raise SubspaceError(
                f"{n_shared} of the subspace's {len(self.subspace_)} modules share the bank of another one, and adapters are "
                "added to one module at a time: build it again with all adapters."
            )
        taken = sorted({str(source["name"]) for source in self.subspace_.info.sources} & set(collection.names))
        if taken:
            raise SubspaceError(
                f"Already in the subspace: {', '.join(map(repr, taken))}. Pass new adapters only, or rename them."
            )

    def _fitter(self, collection: AdapterCollection) -> ModuleFitter:
        return ModuleFitter(
            n_components=self.n_components,
            method=self.method,
            weighting=self.weighting,
            n_pseudo_components=self.n_pseudo_components,
            seed=self.seed,
            tol=self.tol,
            memory_limit=self.memory_limit,
            groups=independent_starts(collection) if AUTO in self._asked_components() else {},
        )

    def _plan(self, collection: AdapterCollection, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Everything a finished module depends on: settings in their order, files by content, factors as they are read."""
        names = ("method", "weighting", "n_pseudo_components", "seed", "tol", "memory_limit")
        asked = self.n_components
        return {
            **{name: getattr(self, name) for name in names},
            # The first pattern that fits counts: as pairs, since the order of an object's entries is easily lost.
            "n_components": [list(pair) for pair in asked.items()] if isinstance(asked, Mapping) else asked,
            "adapters": [
                [record["name"], record["sha256"], collection.layout_fingerprint(str(record["name"]))]
                for record in records
            ],
            "modules": list(collection.modules),
            "versions": {"eigenpeft": __version__, "torch": torch.__version__},
        }

    def _fit_modules(self, collection: AdapterCollection, team: Team, shards: Shards | None) -> dict[str, FittedModule]:
        """All modules, fitted by this process or, with a work folder, by any process of the team, now or earlier."""
        team.gather([], doing="opening the work folder")  # what others are writing is not of a killed process
        if shards is not None and team.is_main:
            shards.forget_damaged()
        team.gather([], doing="looking at what was finished before")
        costs = {
            module: module_cost(sum(collection.ranks(module).values()), collection.shapes[module])
            for module in collection.modules
            if shards is None or module not in shards
        }
        if len(costs) < len(collection.modules) and team.is_main:
            n_modules = len(collection.modules)
            logger.info("%d of %d modules were finished before", n_modules - len(costs), n_modules)
        # Everybody has looked at what is left to do before anybody finishes a module.
        team.gather([], doing="starting")
        fitter = self._fitter(collection)
        fitted: dict[str, FittedModule] = {}
        problems: list[tuple[str, str | CollectionError]] = []
        too_large: list[str] = []
        for module in tqdm(team.part(costs), desc="Fitting", unit="module", disable=not team.is_main):
            try:
                result = fitter.fit(module, collection)
            except CollectionError as error:
                problems.append((module, error))
                break
            except ValueError as error:
                problems.append((module, f"{module}: {error}"))
                continue
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                too_large.append(module)
                break
            if shards is None:
                fitted[module] = result
            elif not problems:
                shards.save(module, result)
        problems, too_large = (team.gather(found, doing="fitting modules") for found in (problems, too_large))
        if too_large and not problems:
            raise memory_does_not_suffice(too_large[0], n_adapters=len(collection.names_with(too_large[0])))
        if problems:
            if shards is not None and team.is_main:
                shards.remove()  # of no use: what is wrong must be changed, and then it is another build
            raise first_of(problems, modules=collection.modules)
        if shards is None:
            return fitted
        return {module: shards.load(module) for module in collection.modules}


def build_subspace(
    adapters: AdapterCollection | str | Path | Sequence[str | Path],
    *,
    n_components: int | float | str | Mapping[str, int | float | str] | None = None,
    **settings: Any,
) -> PrincipalSubspace:
    """The principal subspace of adapters, in one call.

    Args:
        adapters: A collection; or what `AdapterCollection.from_pretrained` takes: folders or Hub ids, or a folder of adapters.
        n_components: As for `SubspaceBuilder`.
        **settings: Further arguments of `SubspaceBuilder`.

    Raises:
        CollectionError: If the adapters cannot be opened together; the message names each problem.
        SubspaceError: As `SubspaceBuilder.fit`.

    Examples:
        >>> from eigenpeft.demo import shipped_adapters
        >>> subspace = build_subspace([shipped_adapters() / "cr", shipped_adapters() / "mr"], n_components=2)
        >>> subspace[subspace.modules[0]].components_in.shape
        torch.Size([2, 384])
    """
    builder = SubspaceBuilder(n_components=n_components, **settings)
    if isinstance(adapters, AdapterCollection):
        return builder.fit(adapters).subspace_
    with AdapterCollection.from_pretrained(adapters) as collection:
        return builder.fit(collection).subspace_
