"""Stores of format 1: coefficients of all members as rows of one matrix per module and side, in one safetensors file."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eigenpeft.artifacts import storage
from eigenpeft.errors import ArtifactError, DamagedFileError
from eigenpeft.subspace.core import Coefficients
from eigenpeft.subspace.principal import PrincipalSubspace
from eigenpeft.subspace.stores.member import AdapterMember


class Format1Records:
    """The members of a store of format 1, each read alone; see `RecordSource`.

    Such a file has no hashes of the coefficients, so that its shapes and row offsets are all that can be checked.

    Args:
        where: Place of the store.
        config: Its config.
        subspace: Its bases.

    Raises:
        ArtifactError: If the parts of the file do not fit each other.
    """

    def __init__(self, where: storage.Location, config: Mapping[str, Any], subspace: PrincipalSubspace):
        self._where, self._subspace = where, subspace
        self._file = storage.open_tensors(where)
        try:
            self._members = _checked_members(config["members"])
            self._positions = {name: j for j, name in enumerate(self._members)}
            self._offsets = _checked_offsets(self._file, subspace, len(self._members))
            self._errors = self._file.get_tensor("relative_errors").double()
            if self._errors.shape != (len(subspace), len(self._members)):
                raise ValueError(f"relative_errors has the shape {tuple(self._errors.shape)}")
        except (KeyError, TypeError, ValueError, DamagedFileError) as error:
            raise ArtifactError(
                f"The adapter store at {where.origin!r} does not fit its config ({error}); get a fresh copy."
            ) from error

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of the rows."""
        return tuple(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __len__(self) -> int:
        return len(self._members)

    def size(self, name: str) -> int:
        """Bytes of a member's coefficients.

        Args:
            name: Its name.
        """
        j = self._positions[name]
        ranks = self._offsets[:, j + 1] - self._offsets[:, j]
        return sum(8 * int(rank) * bank.n_components for rank, bank in zip(ranks, self._subspace.values(), strict=True))

    def read(self, name: str) -> bytes:
        """One member as newer stores keep it.

        Args:
            name: Its name.

        Raises:
            ArtifactError: If it cannot be read.
        """
        j = self._positions[name]
        cores, errors = {}, {}
        for i, module in enumerate(self._subspace):
            start, stop = (int(offset) for offset in self._offsets[i, j : j + 2])
            if start == stop:
                continue
            rows = [self._file.get_slice(f"{module}.coefficients_{side}")[start:stop] for side in ("out", "in")]
            cores[module] = Coefficients(rows[0].mT, rows[1])
            if (error := float(self._errors[i, j])) == error:  # NaN marks "not adapted"
                errors[module] = error
        return AdapterMember(cores, record=self._members[name], kept_aside={}, relative_errors=errors).to_bytes()


def _checked_members(members: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(members, list) or not all(
        isinstance(member, dict) and isinstance(member.get("name"), str) for member in members
    ):
        raise ValueError("its members are not a list of records with names")
    by_name = {member["name"]: dict(member) for member in members}
    if len(by_name) != len(members):
        raise ValueError("two members have the same name")
    return by_name


def _checked_offsets(file: Any, subspace: PrincipalSubspace, n_members: int) -> Tensor:
    offsets = file.get_tensor("row_offsets")
    if offsets.dtype != torch.int64 or offsets.shape != (len(subspace), n_members + 1):
        raise ValueError(
            f"row_offsets is {offsets.dtype} {tuple(offsets.shape)} instead of int64 {(len(subspace), n_members + 1)}"
        )
    if offsets[:, 0].any() or (offsets.diff(dim=1) < 0).any():
        raise ValueError("row_offsets does not ascend from 0")
    for i, (module, bank) in enumerate(subspace.items()):
        for side, components in (("in", bank.components_in), ("out", bank.components_out)):
            rows = file.get_slice(f"{module}.coefficients_{side}")
            expected = [int(offsets[i, -1]), len(components)]
            if rows.get_shape() != expected or rows.get_dtype() != "F32":
                raise ValueError(
                    f"{module}.coefficients_{side} is {rows.get_dtype()} {rows.get_shape()} instead of F32 {expected}"
                )
    return offsets
