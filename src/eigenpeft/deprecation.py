"""Old names that still work for one minor version, with a warning that names the new one."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "eigenpeft."
# Modules that were at the place on the left until 0.1, without the package's name.
MOVED_MODULES = {
    "atomic": "artifacts.atomic",
    "auditing.averages": "audit.adapters.averages",
    "auditing.controls": "audit.controls",
    "auditing.gradient": "audit.task.gradient",
    "auditing.groups": "audit.adapters.groups",
    "auditing.measures": "audit.adapters.measures",
    "auditing.relatives": "audit.adapters.relatives",
    "auditing.report": "audit.report",
    "auditing.run": "audit.run",
    "auditing.suitability": "audit.task.suitability",
    "auditing.summary": "audit.summary",
    "auditing.verdict": "audit.verdict",
    "collection.keys": "collection.formats.keys",
    "collection.settings": "collection.formats.settings",
    "collection.weights": "collection.formats.weights",
    "linalg.alternating": "linalg.bases.alternating",
    "linalg.calibration": "linalg.preference.calibration",
    "linalg.centred": "linalg.bases.centred",
    "linalg.chunked": "linalg.bases.chunked",
    "linalg.fitting": "linalg.bases.fitting",
    "linalg.incremental": "linalg.bases.incremental",
    "linalg.leave_one_out": "linalg.scores.leave_one_out",
    "linalg.low_rank_update": "linalg.layer_update",
    "linalg.nulls": "linalg.scores.nulls",
    "linalg.preference_heads": "linalg.preference.heads",
    "linalg.preference_joint": "linalg.preference.joint",
    "linalg.preference_users": "linalg.preference.users",
    "linalg.stacking": "linalg.bases.stacking",
    "linalg.token_gradients": "linalg.scores.token_gradients",
    "reward.backbone": "reward.text.backbone",
    "reward.card": "reward.artifact.card",
    "reward.controls": "reward.evaluation.controls",
    "reward.features": "reward.text.features",
    "reward.model": "reward.artifact.model",
    "reward.pairs": "reward.artifact.pairs",
    "reward.preparation": "reward.fitting.preparation",
    "reward.selection": "reward.fitting.selection",
    "reward.simulation": "reward.evaluation.simulation",
    "reward.storage": "reward.artifact.storage",
    "reward.user_encoder": "reward.evaluation.user_encoder",
    "reward.users": "reward.artifact.users",
    "subspace.builder": "building.builder",
    "subspace.choosing": "building.choosing",
    "subspace.distributed": "building.team",
    "subspace.module_fitter": "building.module_fitter",
    "subspace.shards": "building.work_folder",
    "subspace.storage": "artifacts.storage",
    "subspace.store": "subspace.stores.store",
    "subspace.streaming": "building.chunks",
    "tuners.adapter_card": "tuners.host.adapter_card",
    "tuners.basis_store": "tuners.layers.shared_bases",
    "tuners.convolution_factors": "tuners.layers.convolution",
    "tuners.embedding_factors": "tuners.layers.embedding",
    "tuners.exact_merging": "tuners.host.exact_merging",
    "tuners.expert_factors": "tuners.layers.experts",
    "tuners.export": "tuners.files.export",
    "tuners.factor_model": "tuners.host.factor_model",
    "tuners.factors": "tuners.layers.linear",
    "tuners.lora_files": "tuners.files.lora_files",
    "tuners.mixed_models": "tuners.host.mixed_models",
    "tuners.rank_padding": "tuners.host.rank_padding",
    "tuners.reference_checkpoints": "tuners.files.reference_checkpoints",
    "tuners.registration": "tuners.host.registration",
    "tuners.restrictions": "tuners.host.restrictions",
    "tuners.routes": "tuners.layers.routes",
    "tuners.swapping": "tuners.layers.kinds",
    "tuners.tied_factors": "tuners.layers.tied",
}


def moved_names(module: str, new_places: Mapping[str, str], *, stacklevel: int = 2) -> Callable[[str], Any]:
    """A module's `__getattr__` that finds names which have moved or have a new name.

    Args:
        module: Name of the module that had the old names.
        new_places: Old name to the dotted place of the object now.
        stacklevel: How far up the calls the line is that the warning shows; 2 is the caller of the function returned.

    Returns:
        The function to assign to `__getattr__`. It warns with `DeprecationWarning` and names the new place.

    Examples:
        >>> find = moved_names("old.place", {"sqroot": "math.sqrt"})
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     find("sqroot")(4.0)
        2.0
        >>> print(caught[0].message)
        old.place.sqroot is deprecated and goes away in the next minor version; use math.sqrt.
    """

    def find(name: str) -> Any:
        if name not in new_places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, attribute = new_places[name].rpartition(".")
        warnings.warn(
            f"{module}.{name} is deprecated and goes away in the next minor version; use {new_places[name]}.",
            DeprecationWarning,
            stacklevel=stacklevel,
        )
        return getattr(import_module(place), attribute)

    return find


class _Alias(ModuleType):
    """Stands at an old place and gives what the module has at its new one."""

    def __init__(self, name: str, module: ModuleType):
        super().__init__(name, module.__doc__)
        self.__dict__["__moved_to__"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["__moved_to__"], name)


class _MovedModules(MetaPathFinder, Loader):
    """Finds modules by their old places; regular finders come first, so that no module of today is hidden."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        is_moved = fullname.startswith(PACKAGE) and fullname.removeprefix(PACKAGE) in MOVED_MODULES
        return ModuleSpec(fullname, self) if is_moved else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        place = PACKAGE + MOVED_MODULES[spec.name.removeprefix(PACKAGE)]
        warnings.warn(
            f"{spec.name} is deprecated and goes away in the next minor version; import {place}.",
            DeprecationWarning,
            stacklevel=2,
        )
        return _Alias(spec.name, import_module(place))

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the module at the new place has run already."""


def find_moved_modules() -> None:
    """Let `import eigenpeft.<old place>` work for the modules of `MOVED_MODULES`, with a warning."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
