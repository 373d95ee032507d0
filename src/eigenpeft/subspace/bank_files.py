"""Banks of bases as files hold them: tensors by name, put together and checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from eigenpeft.artifacts import storage
from eigenpeft.errors import ArtifactError
from eigenpeft.subspace.info import SubspaceInfo
from eigenpeft.subspace.module import TENSOR_FIELDS, ModuleSubspace


@dataclass(frozen=True, eq=False)
class SavedBanks:
    """What an artifact says of its bases.

    Attributes:
        modules: Bank of each module, in order; the same object for modules that share one.
        info: Where they come from.
        fingerprint: The fingerprint that its config names.
    """

    modules: dict[str, ModuleSubspace]
    info: SubspaceInfo
    fingerprint: Any


def banks_from_tensors(
    tensors: Mapping[str, Tensor],
    *,
    modules: Iterable[str],
    shared_banks: Mapping[str, str] | None = None,
    paired_banks: Iterable[str] = (),
) -> dict[str, ModuleSubspace]:
    """The bank of each module from `{"<bank>.<field>": tensor}`.

    Args:
        tensors: As `PrincipalSubspace.tensors` gives them.
        modules: Names, in order.
        shared_banks: Module to the earlier module whose bank it shares; None shares nothing, as in format 1.
        paired_banks: The banks of paired directions.

    Raises:
        ArtifactError: If a tensor is missing or left over, a module shares a bank that there is not, or such a bank is paired
            or has sides that cannot be.
        SubspaceError: If the tensors of a bank do not fit each other.
    """
    names, shared, paired = list(modules), dict(shared_banks or {}), set(paired_banks)
    owners = [name for name in names if name not in shared]
    unknown = sorted(str(name) for name, bank in shared.items() if name not in names or bank not in owners)
    if unknown:
        raise ArtifactError(
            f"The subspace's config lets {len(unknown)} modules, such as {unknown[0]!r}, share a bank that no other "
            "module has. Get a fresh copy."
        )
    expected = {f"{bank}.{field}" for bank in owners for field in TENSOR_FIELDS}
    if expected != set(tensors) or not names:
        missing, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise ArtifactError(
            f"The subspace file does not fit its config: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} unexpected {extra[:3]}, {len(names)} modules listed. Get a fresh copy."
        )
    if not paired <= set(owners):
        raise ArtifactError(
            f"The subspace's config says that {sorted(paired - set(owners))[:3]} are banks of paired directions, and there are no "
            "such banks. Get a fresh copy."
        )
    banks = {
        name: ModuleSubspace(**{field: tensors[f"{name}.{field}"] for field in TENSOR_FIELDS}, paired=name in paired)
        for name in owners
    }
    return {name: banks[shared.get(name, name)] for name in names}


def read_banks(where: storage.Location) -> SavedBanks:
    """The bases of a located artifact: its own, or those that a store of format 1 carries.

    Args:
        where: Place of the artifact.

    Raises:
        ArtifactError: If a part is missing or does not fit the others.
        SubspaceError: If the tensors of a bank do not fit each other.
    """
    config = storage.read_config(where)
    in_store = where.kind is storage.STORE_1
    described, prefix = (config.get("subspace"), "subspace.") if in_store else (config, "")
    modules = described.get("modules") if isinstance(described, dict) else None
    if not isinstance(described, dict) or not (
        isinstance(modules, list) and all(isinstance(module, str) for module in modules)
    ):
        raise ArtifactError(f"The {where.kind.config_name} of {where.origin!r} lists no modules; get a fresh copy.")
    with storage.open_tensors(where) as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a mapping)
        tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    shared = described.get("shared_banks", {})
    if not isinstance(shared, dict) or not all(isinstance(bank, str) for bank in shared.values()):
        raise ArtifactError(
            f"The {where.kind.config_name} of {where.origin!r} has shared_banks that are not a table from modules to "
            "modules; get a fresh copy."
        )
    paired = described.get("paired_banks", [])
    if not isinstance(paired, list) or not all(isinstance(bank, str) for bank in paired):
        raise ArtifactError(
            f"The {where.kind.config_name} of {where.origin!r} has paired_banks that are not a list of names; get a fresh copy."
        )
    banks = banks_from_tensors(tensors, modules=modules, shared_banks=shared, paired_banks=paired)
    return SavedBanks(banks, SubspaceInfo.from_dict(described), config.get("subspace_sha256" if in_store else "sha256"))
