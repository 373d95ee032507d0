"""One adapter in a store: its cores, what it trained besides them, and where it comes from; and all of it as bytes."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from eigenpeft.errors import ArtifactError, SubspaceError
from eigenpeft.subspace.core import Core
from eigenpeft.subspace.principal import PrincipalSubspace

_CORE, _KEPT = "core.", "kept."
_METADATA = "eigenpeft_member"


@dataclass(frozen=True, eq=False)
class AdapterMember(Mapping[str, Core]):
    """One adapter of a store: module of the subspace to its core.

    Attributes:
        cores: Module of the subspace to the core there, with the parts as they were trained and the scaling beside them.
        record: Where it comes from (source, revision, base_model, task_type, rank, lora_alpha, license, sha256), and its
            `config`: what adapter_config.json said, fields without a value left out.
        kept_aside: What the adapter trained besides updates of weights, by key of the adapter's file: heads, biases, tokens.
        relative_errors: Module to ‖ΔW - reconstruction‖ / ‖ΔW‖, Frobenius; empty for adapters that were trained in the
            subspace, which are exact.
        paths: Module of the subspace to its name in the adapter's own model, where that differs.
        subspace_sha256: Fingerprint of the bases that the cores refer to; None where it is not known.
    """

    cores: Mapping[str, Core]
    _: KW_ONLY
    record: Mapping[str, Any] = field(default_factory=dict)
    kept_aside: Mapping[str, Tensor] = field(default_factory=dict)
    relative_errors: Mapping[str, float] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)
    subspace_sha256: str | None = None

    def __getitem__(self, module: str) -> Core:
        """Core of one module.

        Raises:
            KeyError: If the adapter has none there.
        """
        return self.cores[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.cores)

    def __len__(self) -> int:
        return len(self.cores)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of its cores; one, but for adapters that were made by hand."""
        return tuple(dict.fromkeys(core.kind for core in self.cores.values()))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Largest rank that the update can have, module by module: r of a factored core, min(K_in, K_out) of another."""
        return tuple(
            core.row.sizes(core.parts)[2] if core.row.is_factored else min(core.n_components_in, core.n_components_out)
            for core in self.cores.values()
        )

    @property
    def n_bytes(self) -> int:
        """Size of cores and kept tensors in bytes."""
        kept = sum(tensor.numel() * tensor.element_size() for tensor in self.kept_aside.values())
        return kept + sum(core.n_bytes for core in self.cores.values())

    @property
    def config(self) -> Mapping[str, Any]:
        """What the adapter's adapter_config.json said; empty for members of stores of format 1."""
        return self.record.get("config") or {}

    def path(self, module: str) -> str:
        """Name of a module in the adapter's own model.

        Args:
            module: Module of the subspace.
        """
        return self.paths.get(module, module)

    def to_bytes(self) -> bytes:
        """The member as one safetensors file: `core.<module>.<part>`, `kept.<key>`, and the rest as metadata."""
        tensors = {
            f"{_CORE}{module}.{part}": tensor
            for module, core in self.cores.items()
            for part, tensor in core.parts.items()
        }
        tensors |= {f"{_KEPT}{key}": tensor for key, tensor in self.kept_aside.items()}
        owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        modules = {module: _described(core, module, self) for module, core in self.cores.items()}
        bases = {} if self.subspace_sha256 is None else {"bases": self.subspace_sha256}
        text = json.dumps(
            {"record": dict(self.record), "modules": modules, **bases},
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
        )
        # One entry alone: safetensors writes several in an order that changes from call to call.
        return save(owned, metadata={_METADATA: text})

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str, subspace: PrincipalSubspace) -> "AdapterMember":
        """Read `to_bytes` back and check that it fits the bases.

        Args:
            data: The bytes.
            name: What messages call the member.
            subspace: Bases that the cores refer to.

        Raises:
            ArtifactError: If the bytes are not a member, or one of other bases.
        """
        own = None
        try:
            tensors = load(data)
            described = json.loads(_metadata(data)[_METADATA])
            own = described.get("bases")
            if own is None or subspace.has_been(own):
                return cls._from_parts(tensors, described, subspace)
        except (
            SafetensorError,
            SubspaceError,
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
            ValueError,
            RecursionError,
        ) as error:
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, SubspaceError) else str(error)
            raise ArtifactError(
                f"The member {name!r} of the store cannot be read ({reason}). Get a fresh copy of the store, or remove that "
                "member."
            ) from error
        raise ArtifactError(
            f"The member {name!r} belongs to bases of fingerprint {str(own)[:64]}, and those that were read have "
            f"{subspace.fingerprint}: the store was written with other bases since it was opened. Call refresh(), or open it "
            "again."
        )

    @classmethod
    def _from_parts(
        cls, tensors: Mapping[str, Tensor], described: Mapping[str, Any], subspace: PrincipalSubspace
    ) -> "AdapterMember":
        cores, errors, paths, used = {}, {}, {}, 0
        finite = _all_finite(tensors)  # at once: hundreds of small questions take as long as all else here
        for module, entry in described["modules"].items():
            parts = {part: tensors[f"{_CORE}{module}.{part}"] for part in entry["parts"]}
            used += len(parts)
            cores[module] = Core(entry["kind"], parts, _number(entry.get("scaling", 1.0)))
            check_core(cores[module], module, subspace, known_finite=finite)
            if "error" in entry:
                errors[module] = _number(entry["error"])
            if "path" in entry:
                paths[module] = str(entry["path"])
        kept = {key.removeprefix(_KEPT): tensor for key, tensor in tensors.items() if key.startswith(_KEPT)}
        if used + len(kept) != len(tensors):
            raise ValueError(f"{len(tensors) - used - len(kept)} tensors more than it lists")
        record = described["record"]
        if not isinstance(record, dict) or not isinstance(record.get("config") or {}, dict):
            raise ValueError("its record is not a JSON object")
        return cls(cores, record=record, kept_aside=kept, relative_errors=errors, paths=paths)


def record_in(data: bytes, *, name: str) -> dict[str, Any]:
    """The record of a member from its bytes, without its tensors.

    Args:
        data: As `to_bytes` gave them.
        name: Its name in the store.

    Raises:
        ArtifactError: If the bytes are not a member.
    """
    try:
        return {**json.loads(_metadata(data)[_METADATA])["record"], "name": name}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"The member {name!r} of the store cannot be read ({error}). Get a fresh copy.") from error


def check_core(core: Core, module: str, subspace: PrincipalSubspace, *, known_finite: bool = False) -> None:
    """Refuse a core that does not fit a module of a subspace.

    Args:
        core: The core; it may use fewer components than there are, the first ones.
        module: Name of the module.
        subspace: The bases.
        known_finite: Whether it is known already that all numbers are finite.

    Raises:
        SubspaceError: If the subspace lacks the module or has fewer components, or if numbers of the core are not finite.
    """
    if module not in subspace:
        raise SubspaceError(f"it has a core for {module!r}, which is not in the subspace of {len(subspace)} modules")
    bank = subspace[module]
    n_in, n_out = bank.n_components_in, bank.n_components_out
    if core.n_components_in > n_in or core.n_components_out > n_out:
        raise SubspaceError(
            f"its core of {module!r} is for {core.n_components_out} x {core.n_components_in} components, and the subspace "
            f"has {n_out} x {n_in}"
        )
    if bank.paired and core.row.is_matrix:
        raise SubspaceError(
            f"its core of {module!r} is of kind {core.kind!r}, and paired directions have cores of kind 'diagonal' alone"
        )
    for part, tensor in core.parts.items():
        if not tensor.is_floating_point():
            raise SubspaceError(f"{part} of {module!r} holds {tensor.dtype} instead of floating-point numbers")
        if not known_finite and not bool(tensor.isfinite().all()):
            raise SubspaceError(f"{part} of {module!r} holds NaN or infinite numbers")


def _all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all floating-point numbers are finite."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            kinds.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
    return all(bool(torch.cat(parts).isfinite().all()) for parts in kinds.values())


def _described(core: Core, module: str, member: AdapterMember) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": core.kind, "parts": list(core.parts)}
    if core.scaling != 1.0:
        entry["scaling"] = core.scaling
    if module in member.relative_errors:
        entry["error"] = member.relative_errors[module]
    if member.path(module) != module:
        entry["path"] = member.path(module)
    return entry


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size])["__metadata__"]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)
