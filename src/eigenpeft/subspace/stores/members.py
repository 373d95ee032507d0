"""Many adapters in one subspace, to be read: by name, by module, with their records and errors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from eigenpeft.artifacts.records.source import RecordSource
from eigenpeft.subspace.core import Core
from eigenpeft.subspace.principal import PrincipalSubspace
from eigenpeft.subspace.stores.member import AdapterMember


class AdapterMembers(Mapping[str, AdapterMember]):
    """The members of a store, read one by one; `AdapterStore` says what they are and changes them.

    Attributes:
        subspace: The bases that the cores refer to.
    """

    subspace: PrincipalSubspace
    _records: RecordSource

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the members."""
        return self._records.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._records.names)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def __getitem__(self, name: str) -> AdapterMember:
        """One member, read when it is asked for.

        Raises:
            KeyError: If there is no such member; the message lists known names.
            ArtifactError: If it cannot be read.
        """
        self._check_name(name)
        member = AdapterMember.from_bytes(self._records.read(name), name=name, subspace=self.subspace)
        return replace(member, record={**member.record, "name": name}, subspace_sha256=self.subspace.fingerprint)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(adapters={len(self)}, subspace={self.subspace!r})"

    @property
    def members(self) -> tuple[dict[str, Any], ...]:
        """Records of all members, in the order of `names`; reads every member.

        Raises:
            ArtifactError: If a member cannot be read.
        """
        return tuple(dict(self[name].record) for name in self.names)

    @property
    def relative_errors(self) -> dict[str, dict[str, float]]:
        """`{module: {member: ‖ΔW - reconstruction‖ / ‖ΔW‖}}`, Frobenius; reads every member.

        Members that were trained in the subspace are exact and have no entry, nor have modules that a member lacks.

        Raises:
            ArtifactError: If a member cannot be read.
        """
        errors: dict[str, dict[str, float]] = {module: {} for module in self.subspace}
        for name in self.names:
            for module, error in self[name].relative_errors.items():
                errors[module][name] = error
        return errors

    @property
    def n_bytes(self) -> int:
        """Size of bases and members in bytes."""
        return self.subspace.n_bytes + sum(self._records.size(name) for name in self.names)

    def member(self, name: str) -> dict[str, Any]:
        """The record of one member.

        Args:
            name: Its name in the store.

        Raises:
            KeyError: If there is no such member; the message lists known names.
            ArtifactError: If it cannot be read.
        """
        return dict(self[name].record)

    def fingerprint(self, name: str) -> str:
        """Hash of a member as it is now, and of the bases: the same wherever the same member is kept.

        Args:
            name: Its name in the store.

        Raises:
            KeyError: If there is no such member.
            ArtifactError: If it cannot be read.
        """
        self._check_name(name)
        return sha256(self.subspace.fingerprint.encode() + self._records.read(name)).hexdigest()

    def coefficients(self, name: str, *, module: str) -> Core | None:
        """The core of one member on one module; None if it does not adapt the module.

        Args:
            name: Member.
            module: Module of the subspace.

        Raises:
            KeyError: If there is no such member.
            ArtifactError: If it cannot be read.
        """
        return self[name].cores.get(module)

    def factors(self, name: str, *, module: str) -> tuple[Tensor, Tensor] | None:
        """LoRA factors `(lora_B (out_features, r), lora_A (r, in_features))` of one member, scaling in lora_B.

        Args:
            name: Member.
            module: Module of the subspace.

        Raises:
            KeyError: If there is no such member.
            ArtifactError: If it cannot be read.
        """
        core = self.coefficients(name, module=module)
        return None if core is None else self.subspace.reconstruct({module: core})[module]

    def cores(self, module: str, *, names: Sequence[str] | None = None) -> Tensor:
        """The cores `M` of all members on one module, scaling included; reads every member.

        Args:
            module: Module of the subspace.
            names: Which members, in the order wanted; None takes all.

        Returns:
            (n_members, K_out, K_in), float32; zeros where a member lacks the module.

        Raises:
            KeyError: If there is no such module or member.
            ArtifactError: If a member cannot be read.
        """
        bank = self.subspace[module]
        names = self.names if names is None else names
        dense = torch.zeros(len(names), len(bank.components_out), len(bank.components_in))
        for row, name in enumerate(names):
            core = self[name].cores.get(module)
            if core is not None:
                dense[row, : core.n_components_out, : core.n_components_in] = core.dense()
        return dense

    def _each(self) -> Iterator[tuple[str, bytes]]:
        return ((name, self._records.read(name)) for name in self.names)

    def _check_name(self, name: str) -> None:
        if name not in self._records:
            shown = ", ".join(repr(known) for known in self.names[:10]) + (", ..." if len(self) > 10 else "")
            raise KeyError(f"{name!r} is not in the store; it has {len(self)} adapters: {shown}")
