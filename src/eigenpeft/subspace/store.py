"""One subspace and the coefficients of many adapters in one file, each member readable alone."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError
from torch import Tensor

from eigenpeft.artifacts import storage
from eigenpeft.collection.reader import AdapterCollection
from eigenpeft.errors import ArtifactError, SubspaceError
from eigenpeft.linalg.factored import frobenius_norm, projection_residual
from eigenpeft.subspace.card import subspace_card
from eigenpeft.subspace.cores import Coefficients
from eigenpeft.subspace.module import ModuleSubspace
from eigenpeft.subspace.principal import PrincipalSubspace, read_subspace


class CoefficientStore(Mapping[str, Mapping[str, Coefficients]]):
    """Coefficients by adapter and module: `store["my-adapter"]["encoder.layer.0.attention.self.query"]`.

    Made by `PrincipalSubspace.project`. All adapters' coefficients on a module are rows of one matrix, so that opening
    a store of a thousand adapters reads a header, one member is a slice of each matrix, and all members of a module
    are one read.

    Args:
        subspace: The bases the coefficients refer to.
        members: One record an adapter (name, source, ranks, alpha, task type, ...), in the order of the rows.
        row_offsets: (n_modules, n_members + 1), int64; member j has rows `row_offsets[i, j]:row_offsets[i, j + 1]` of
            module i. No rows means that it does not adapt the module.
        rows: `{"<module>.coefficients_in" | "<module>.coefficients_out": (rows, n_components)}`; anything with
            `get_slice(name)` semantics of safetensors is read lazily.
        relative_errors: (n_modules, n_members), relative Frobenius error of ΔW; NaN where a member has no rows.
    """

    def __init__(
        self,
        subspace: PrincipalSubspace,
        *,
        members: Sequence[Mapping[str, Any]],
        row_offsets: Tensor,
        rows: Any,
        relative_errors: Tensor,
    ):
        self.subspace = subspace
        self.members = tuple(dict(member) for member in members)
        self.origin: str | None = None
        self.revision: str | None = None
        self._row_offsets = row_offsets
        self._rows = rows
        self._error_matrix = relative_errors
        self._index = {member["name"]: position for position, member in enumerate(self.members)}
        self._module_index = {module: position for position, module in enumerate(subspace)}
        expected = (len(subspace), len(self.members) + 1)
        if tuple(row_offsets.shape) != expected or tuple(relative_errors.shape) != (
            expected[0],
            expected[1] - 1,
        ):
            raise SubspaceError(
                f"row_offsets {tuple(row_offsets.shape)} and relative_errors {tuple(relative_errors.shape)} do not fit "
                f"{len(subspace)} modules and {len(self.members)} adapters."
            )
        if len(self._index) != len(self.members):
            raise SubspaceError("Two adapters of a store have the same name; names must be unique.")

    @classmethod
    def from_collection(cls, subspace: PrincipalSubspace, collection: AdapterCollection) -> "CoefficientStore":
        """Project every adapter of a collection, module by module, and measure what is lost.

        Args:
            subspace: Bases to project on.
            collection: Adapters of the same base model. Modules that the subspace lacks are an error: their update
                would be dropped without a trace.

        Raises:
            SubspaceError: If an adapter adapts a module that is not in the subspace, or shapes differ.
            CollectionError: If a tensor cannot be read or is not finite.
        """
        found = {module: subspace.find(module) for module in collection.modules}
        unknown = [module for module, name in found.items() if name is None]
        if unknown:
            raise SubspaceError(
                f"{len(unknown)} of the {len(collection.modules)} adapted modules are not in the subspace, such as "
                f"{unknown[0]!r}. Build the subspace from a collection that adapts them, or leave out the adapters "
                "that do."
            )
        read_as = {name: module for module, name in found.items() if name is not None}
        offsets = torch.zeros(len(subspace), len(collection) + 1, dtype=torch.int64)
        errors = torch.full((len(subspace), len(collection)), float("nan"), dtype=torch.float64)
        rows: dict[str, Tensor] = {}
        for i, module in enumerate(tqdm(subspace.modules, desc="Projecting", unit="module")):
            factors = {read.adapter: read for read in collection.factors(read_as[module])} if module in read_as else {}
            no_rows = torch.zeros(0, subspace[module].n_components)
            rows_in, rows_out = [no_rows], [no_rows]
            for j, name in enumerate(collection.names):
                offsets[i, j + 1] = offsets[i, j]
                if name in factors:
                    pair = factors[name].lora_B, factors[name].lora_A
                    coefficients = subspace.project({module: pair})[module]
                    rows_in.append(coefficients.coefficients_in)
                    rows_out.append(coefficients.coefficients_out.mT)
                    offsets[i, j + 1] += len(coefficients.coefficients_in)
                    errors[i, j] = _relative_error(*pair, subspace[module])
            rows[f"{module}.coefficients_in"] = torch.cat(rows_in)
            rows[f"{module}.coefficients_out"] = torch.cat(rows_out)
        members = [adapter.record() for adapter in collection.adapters]
        return cls(subspace, members=members, row_offsets=offsets, rows=rows, relative_errors=errors)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters."""
        return tuple(self._index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, name: str) -> dict[str, Coefficients]:
        self.member(name)
        return {
            module: coefficients
            for module in self.subspace
            if (coefficients := self.coefficients(name, module)) is not None
        }

    def __repr__(self) -> str:
        return f"CoefficientStore(adapters={len(self)}, subspace={self.subspace!r})"

    def member(self, name: str) -> dict[str, Any]:
        """The record of one adapter.

        Args:
            name: Its name in the store.

        Raises:
            KeyError: If there is no such adapter; the message lists close names.
        """
        if name not in self._index:
            shown = ", ".join(repr(known) for known in self.names[:10]) + (", ..." if len(self) > 10 else "")
            raise KeyError(f"{name!r} is not in the store; it has {len(self)} adapters: {shown}")
        return self.members[self._index[name]]

    def coefficients(self, name: str, module: str) -> Coefficients | None:
        """Coefficients of one adapter on one module, reading nothing else; None if it does not adapt the module.

        Args:
            name: Adapter.
            module: Module of the subspace.
        """
        i, j = self._module_index[module], self._index[name]
        start, stop = (int(offset) for offset in self._row_offsets[i, j : j + 2])
        if start == stop:
            return None
        return Coefficients(
            coefficients_out=_read_rows(self._rows, f"{module}.coefficients_out", start, stop).mT,
            coefficients_in=_read_rows(self._rows, f"{module}.coefficients_in", start, stop),
        )

    def padded(self, module: str) -> tuple[Tensor, Tensor]:
        """Coefficients of all adapters on one module, in one read, padded with zeros to the greatest rank r.

        Args:
            module: Module of the subspace.

        Returns:
            Coefficients of the input side, (n_members, r, n_components), and of the output side, (n_members,
            n_components, r), scaling included; zeros where an adapter has a smaller rank or lacks the module.
        """
        offsets = self._row_offsets[self._module_index[module]]
        ranks = offsets.diff()
        slots = torch.arange(int(ranks.max()) if len(ranks) else 0)
        taken = slots < ranks[:, None]
        sides = []
        for side in ("in", "out"):
            rows = _read_rows(self._rows, f"{module}.coefficients_{side}", None, None)
            padded = rows.new_zeros(*taken.shape, rows.shape[1])
            padded[taken] = rows
            sides.append(padded)
        return sides[0], sides[1].mT.contiguous()

    def factors(self, name: str, module: str) -> tuple[Tensor, Tensor] | None:
        """LoRA factors `(lora_B (out_features, r), lora_A (r, in_features))` of one adapter, scaling in lora_B.

        Args:
            name: Adapter.
            module: Module of the subspace.
        """
        coefficients = self.coefficients(name, module)
        if coefficients is None:
            return None
        return self.subspace.reconstruct({module: coefficients})[module]

    @property
    def relative_errors(self) -> dict[str, dict[str, float]]:
        """`{module: {adapter: ‖ΔW - reconstruction‖ / ‖ΔW‖}}`, Frobenius; modules an adapter lacks are left out."""
        return {
            module: {
                name: float(error)
                for name, error in zip(self.names, self._error_matrix[i].tolist(), strict=True)
                if error == error  # NaN marks "not adapted"
            }
            for i, module in enumerate(self.subspace)
        }

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the file: bases, coefficients, row offsets, errors."""
        names = [f"{module}.coefficients_{side}" for module in self.subspace for side in ("in", "out")]
        return {
            **{f"subspace.{name}": tensor for name, tensor in self.subspace.tensors().items()},
            **{name: _read_rows(self._rows, name, None, None) for name in names},
            "row_offsets": self._row_offsets,
            "relative_errors": self._error_matrix,
        }

    @property
    def n_bytes(self) -> int:
        """Size of bases and coefficients in bytes."""
        total_rows = int(
            sum(self._row_offsets[i, -1] * bases.n_components for i, bases in enumerate(self.subspace.values()))
        )
        return self.subspace.n_bytes + 2 * 4 * total_rows

    def save_pretrained(self, save_directory: str | Path, *, overwrite: bool = False) -> None:
        """Write `store_config.json`, `store.safetensors` and a model card; whole or not at all.

        Args:
            save_directory: Folder to make.
            overwrite: Whether to replace another store there, which must have been written by eigenpeft. Saving the same
                store again changes nothing and needs no permission.

        Raises:
            ArtifactError: If the folder cannot be written, or holds something that is not replaced.
        """
        config = {
            "subspace_sha256": self.subspace.fingerprint,
            "subspace": {**self.subspace.info.to_dict(), "modules": list(self.subspace.modules)},
            "members": list(self.members),
        }
        card = subspace_card(
            self.subspace.info, self.subspace.rows(), fingerprint=self.subspace.fingerprint, is_store=True
        )
        storage.write_artifact(
            save_directory, storage.STORE, config=config, tensors=self.tensors(), card=card, overwrite=overwrite
        )
        self.origin, self.revision = str(save_directory), None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "CoefficientStore":
        """Open a store; the bases are read and checked, coefficients are read when asked for.

        Args:
            path_or_id: Folder, or Hub id `owner/name`.
            revision: Hub branch, tag or commit.
            token: Hub token; None takes the logged-in one.
            cache_dir: Hub cache.
            local_files_only: Use the Hub cache alone.

        Raises:
            SubspaceNotFoundError: If there is none at that place.
            ArtifactError: If files are missing, truncated or altered.
        """
        where = storage.locate(
            path_or_id,
            storage.STORE,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        subspace, config = read_subspace(where), storage.read_config(where)
        file = storage.open_tensors(where)
        try:
            offsets, errors = file.get_tensor("row_offsets"), file.get_tensor("relative_errors")
            store = cls(subspace, members=config["members"], row_offsets=offsets, rows=file, relative_errors=errors)
        except (KeyError, TypeError, SafetensorError, SubspaceError) as error:
            raise ArtifactError(
                f"The coefficient store at {str(path_or_id)!r} does not fit its config ({error}); get a fresh copy."
            ) from error
        store.origin, store.revision = where.origin, where.revision
        return store

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload coefficient store",
    ) -> str:
        """Upload to the Hub as a model repository; returns the commit's address.

        Args:
            repo_id: `owner/name`; made when it does not exist.
            private: Visibility of a new repository.
            token: Hub token; None takes the logged-in one.
            commit_message: Message of the commit.
        """
        origin, revision = self.origin, self.revision
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(Path(scratch) / "store")
            self.origin, self.revision = origin, revision
            return storage.push_folder(
                Path(scratch) / "store", repo_id, private=private, token=token, message=commit_message
            )


def _read_rows(rows: Any, name: str, start: int | None, stop: int | None) -> Tensor:
    if isinstance(rows, Mapping):
        return rows[name][start:stop]
    return rows.get_slice(name)[start:stop]  # an open safetensors file: reads these rows alone


def _relative_error(lora_B: Tensor, lora_A: Tensor, bases: ModuleSubspace) -> float:
    norm = float(frobenius_norm(lora_B, lora_A))
    if norm == 0.0:
        return 0.0  # nothing to represent: an untrained adapter is reproduced exactly
    residual = projection_residual(
        lora_B, lora_A, components_out=bases.components_out, components_in=bases.components_in
    )
    return float(residual) / norm
