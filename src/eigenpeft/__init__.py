"""Recycle LoRA adapters: principal subspaces, coefficient-only fine-tuning, exact export to plain LoRA.

Importing this package makes the methods EIGENLORA, MOSLORA and SHARDLORA known to PEFT, as soon as PEFT itself is imported.
Everything else is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from eigenpeft.deprecation import find_moved_modules, moved_names
from eigenpeft.errors import EigenPeftError
from eigenpeft.lazy import after_import, lazy_names
from eigenpeft.version import __version__

if TYPE_CHECKING:
    from eigenpeft.audit import audit_adapters
    from eigenpeft.building import SubspaceBuilder
    from eigenpeft.collection import AdapterCollection
    from eigenpeft.combining import merge
    from eigenpeft.reward import LowRankRewardModel
    from eigenpeft.subspace import AdapterStore, PrincipalSubspace
    from eigenpeft.tuners import AdapterBank, EigenLoraConfig, MosLoraConfig, export_lora

__all__ = [
    "AdapterBank",
    "AdapterCollection",
    "AdapterStore",
    "EigenLoraConfig",
    "EigenPeftError",
    "LowRankRewardModel",
    "MosLoraConfig",
    "PrincipalSubspace",
    "SubspaceBuilder",
    "__version__",
    "audit_adapters",
    "export_lora",
    "merge",
]

_PLACES = {
    "AdapterBank": "eigenpeft.tuners",
    "AdapterCollection": "eigenpeft.collection",
    "AdapterStore": "eigenpeft.subspace",
    "EigenLoraConfig": "eigenpeft.tuners",
    "LowRankRewardModel": "eigenpeft.reward",
    "MosLoraConfig": "eigenpeft.tuners",
    "PrincipalSubspace": "eigenpeft.subspace",
    "SubspaceBuilder": "eigenpeft.building",
    "audit_adapters": "eigenpeft.audit",
    "export_lora": "eigenpeft.tuners",
    "merge": "eigenpeft.combining",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _otherwise(name: str) -> object:
    if name == "audit":  # the package, which can be called: short for audit_adapters
        return import_module("eigenpeft.audit")
    return _old_names(name)


_old_names = moved_names(
    __name__,
    {
        "AdapterIndex": "eigenpeft.indexing.AdapterIndex",
        "CoefficientStore": "eigenpeft.AdapterStore",
        "TaskBank": "eigenpeft.AdapterBank",
        "build_subspace": "eigenpeft.building.build_subspace",
        "init_lora_from_subspace": "eigenpeft.tuners.init_lora_from_subspace",
        "nearest_adapters": "eigenpeft.audit.nearest_adapters",
    },
    stacklevel=4,  # past `_otherwise` and the finder of `lazy_names`, to the line that uses the old name
)
__getattr__ = lazy_names(__name__, _PLACES, otherwise=_otherwise)
find_moved_modules()
after_import("peft", lambda: import_module("eigenpeft.tuners"))
