"""The principal subspace of a collection of adapters: banks of frozen bases, and which module uses which."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from eigenpeft.artifacts import storage
from eigenpeft.artifacts.pushing import Pushable
from eigenpeft.errors import ArtifactError, SubspaceError
from eigenpeft.linalg.coefficients import reconstruct
from eigenpeft.subspace.bank_files import banks_from_tensors, read_banks
from eigenpeft.subspace.card import ModuleRow, subspace_card
from eigenpeft.subspace.core import Core
from eigenpeft.subspace.info import SubspaceInfo
from eigenpeft.subspace.lineage import banks_before
from eigenpeft.subspace.module import ModuleSubspace
from eigenpeft.subspace.projecting import place


class PrincipalSubspace(Pushable, Mapping[str, ModuleSubspace]):
    """Frozen bases by module name: `subspace["encoder.layer.0.attention.self.query"].components_in`.

    Made by `SubspaceBuilder`, kept by `save_pretrained`, read by `from_pretrained`; adapters of type EIGENLORA learn
    coefficients on it. A bank that several modules share is kept once, in memory and on disk.

    Args:
        modules: Bank of each module, by module name; the same object for modules that share one.
        info: Where they come from.

    Raises:
        SubspaceError: If `modules` is empty.

    Examples:
        >>> import torch
        >>> from eigenpeft.subspace import ModuleSubspace, PrincipalSubspace
        >>> bank = ModuleSubspace(
        ...     components_in=torch.eye(2, 4),
        ...     components_out=torch.eye(2, 3),
        ...     singular_values_in=torch.tensor([2.0, 1.0]),
        ...     singular_values_out=torch.tensor([2.0, 1.0]),
        ...     explained_variance_ratio=torch.tensor([0.8, 0.2]),
        ... )
        >>> subspace = PrincipalSubspace({"layer.0": bank})
        >>> subspace.modules, subspace["layer.0"].n_components
        (('layer.0',), 2)
    """

    label = storage.SUBSPACE.label

    def __init__(self, modules: Mapping[str, ModuleSubspace], *, info: SubspaceInfo | None = None):
        if not modules:
            raise SubspaceError("A subspace needs at least one module; none was given.")
        self._modules = dict(modules)
        owners: dict[int, str] = {}
        self._bank_of = {name: owners.setdefault(id(bank), name) for name, bank in self._modules.items()}
        self.info = info or SubspaceInfo()
        self.origin: str | None = None
        """The path or Hub id this object was loaded from or saved to; None while it is only in memory."""
        self.revision: str | None = None
        """The Hub revision it was loaded from; None for local folders."""

    def __getitem__(self, module: str) -> ModuleSubspace:
        """Bank of one module.

        Raises:
            KeyError: If the subspace lacks the module.
        """
        try:
            return self._modules[module]
        except KeyError:
            raise KeyError(
                f"{module!r} is not in the subspace of {len(self)} modules, such as {self.modules[0]!r}."
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrincipalSubspace) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        counts = sorted({count for bank in self.values() for count in bank.sides})
        span = str(counts[0]) if len(counts) == 1 else f"{counts[0]}..{counts[-1]}"
        banks = f"banks={len(self.banks)}, " if len(self.banks) < len(self) else ""
        return (
            f"PrincipalSubspace(modules={len(self)}, {banks}n_components={span}, method={self.info.method!r}, "
            f"adapters={len(self.info.sources)}, explained_share={self.explained_share:.3f})"
        )

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules, in the base model's order."""
        return tuple(self._modules)

    @property
    def banks(self) -> dict[str, ModuleSubspace]:
        """The banks, each once, by the name of the first module that uses it."""
        return {name: self._modules[name] for name in dict.fromkeys(self._bank_of.values())}

    @property
    def bank_of(self) -> dict[str, str]:
        """Module to the name of its bank in `banks`: its own name, unless it shares the bank of an earlier module."""
        return dict(self._bank_of)

    @property
    def paired_banks(self) -> tuple[str, ...]:
        """Names of the banks of paired directions, in which adapters have diagonal cores."""
        return tuple(name for name, bank in self.banks.items() if bank.paired)

    @property
    def explained_share(self) -> float:
        """Mean over the modules of their explained shares."""
        return sum(bank.explained_share for bank in self.values()) / len(self)

    @property
    def n_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all tensors, over who shares a bank and which banks are paired."""
        of_tensors = storage.fingerprint(self.tensors())
        shared, paired = self._shared(), self.paired_banks
        if not shared and not paired:  # as format 1 has it, to which adapters refer
            return of_tensors
        said = [of_tensors, sorted(shared.items()), *([sorted(paired)] if paired else [])]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors as `{"<bank>.<field>": tensor}`, the layout of the file, in the shapes that `ModuleSubspace` says."""
        return {
            f"{place}.{name}": tensor for place, bank in self.banks.items() for name, tensor in bank.tensors().items()
        }

    def config(self) -> dict[str, Any]:
        """What `subspace_config.json` says, besides the version of the format."""
        named = {"modules": list(self.modules), "shared_banks": self._shared()}
        paired = {"paired_banks": list(self.paired_banks)} if self.paired_banks else {}
        return {"sha256": self.fingerprint, **self.info.to_dict(), **named, **paired}

    def map_banks(self, change: Callable[[str, ModuleSubspace], ModuleSubspace]) -> dict[str, ModuleSubspace]:
        """Every module with a changed bank, the shared ones changed once and still shared.

        Args:
            change: Takes the name of a bank and the bank.

        Examples:
            >>> import torch
            >>> ones = torch.ones(2)
            >>> spectra = {"singular_values_in": ones, "singular_values_out": ones, "explained_variance_ratio": ones / 2}
            >>> one = ModuleSubspace(torch.eye(2, 4), torch.eye(2, 3), **spectra)
            >>> subspace = PrincipalSubspace({"a": one, "b": one})
            >>> smaller = PrincipalSubspace(subspace.map_banks(lambda name, bank: bank.truncate((2, 1))))
            >>> smaller["b"].n_components_in, smaller["b"].n_components_out, smaller["a"] is smaller["b"]
            (2, 1, True)
        """
        changed = {name: change(name, bank) for name, bank in self.banks.items()}
        return {module: changed[bank] for module, bank in self._bank_of.items()}

    def truncate(self, n_components: int | tuple[int, int]) -> "PrincipalSubspace":
        """The subspace with at most `n_components` components per module, most important first.

        Args:
            n_components: At least 1, or `(K_in, K_out)`. Modules that have fewer keep what they have.

        Raises:
            SubspaceError: If `n_components` is less than 1, or asks paired directions for two numbers.
        """

        def fewer(_: str, bank: ModuleSubspace) -> ModuleSubspace:
            if isinstance(n_components, tuple):
                n_in, n_out = (min(count, own) for count, own in zip(n_components, bank.sides, strict=True))
                return bank.truncate((n_in, n_out))
            return bank.truncate(min(n_components, bank.n_components))

        modules = self.map_banks(fewer)
        n_pseudo = max(bank.n_pseudo_components for bank in modules.values())
        asked = "{} (in), {} (out)".format(*n_components) if isinstance(n_components, tuple) else n_components
        return PrincipalSubspace(modules, info=replace(self.info, n_components=asked, n_pseudo_components=n_pseudo))

    def has_been(self, fingerprint: str) -> bool:
        """Whether a fingerprint is this subspace's, or one that it had before it grew.

        Args:
            fingerprint: The fingerprint.
        """
        return fingerprint == self.fingerprint or any(entry["sha256"] == fingerprint for entry in self.info.grown_from)

    def earlier(self, fingerprint: str) -> "PrincipalSubspace | None":
        """This subspace as it was before it grew, when it had another fingerprint: the first of its components, no copies.

        Args:
            fingerprint: That fingerprint; the present one gives the subspace itself.

        Returns:
            The earlier subspace, its fingerprint computed and compared; None if this one has not grown from it.
        """
        if fingerprint == self.fingerprint:
            return self
        for number, entry in enumerate(self.info.grown_from):
            if entry["sha256"] == fingerprint:
                sources, lineage = self.info.sources[: entry["n_sources"]], self.info.grown_from[:number]
                info = replace(self.info, sources=sources, grown_from=lineage)
                try:
                    before = PrincipalSubspace(banks_before(self._modules, entry), info=info)
                except SubspaceError:
                    return None
                return before if before.fingerprint == fingerprint else None
        return None

    def project(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Core]:
        """The core of one adapter, whose update is the nearest; for a whole collection see `AdapterStore.from_collection`.

        On orthonormal components that is `Coefficients`, the orthogonal projection. On paired directions it is a core of kind
        "diagonal", by least squares: K numbers per module.

        Args:
            factors: `(lora_B (out_features, r), lora_A (r, in_features))` by module, scaling folded into lora_B.

        Returns:
            By module, `Coefficients` of C_out (K_out, r) and C_in (r, K_in), or a core of K numbers.

        Raises:
            SubspaceError: If a module is not in the subspace, or has another shape there.
        """
        return {
            module: place(module, bank=self._modules.get(module), lora_B=lora_B, lora_A=lora_A)
            for module, (lora_B, lora_A) in factors.items()
        }

    def reconstruct(self, coefficients: Mapping[str, Core]) -> dict[str, tuple[Tensor, Tensor]]:
        """LoRA factors by module from coefficients, `B = V_outᵀ C_out` and `A = C_in V_in`; the scaling stays in lora_B.

        Args:
            coefficients: As `project` gives them.

        Returns:
            `(lora_B (out_features, r), lora_A (r, in_features))` by module, r that of the core.

        Raises:
            KeyError: If a module is not in the subspace.
        """
        made = {}
        for module, core in coefficients.items():
            bank, (left, right) = self[module], core.factors()
            made[module] = reconstruct(
                left,
                right,
                components_out=bank.components_out[: left.shape[0]],  # a core may use the first ones alone
                components_in=bank.components_in[: right.shape[1]],
            )
        return made

    def find(self, module: str) -> str | None:
        """The subspace's own name of `module`; None where no name fits, or several do.

        The same base model under another head has other prefixes ("bert.encoder.layer.0" or "encoder.layer.0"), so
        names that agree up to a dotted prefix are the same module as long as only one fits.

        Args:
            module: Module name in some model.
        """
        if module in self._modules:
            return module
        fits = [name for name in self._modules if name.endswith(f".{module}") or module.endswith(f".{name}")]
        return fits[0] if len(fits) == 1 else None

    def card(self) -> str:
        """Text of the model card, complete without editing."""
        return subspace_card(self.info, self.rows(), fingerprint=self.fingerprint)

    def rows(self) -> list[ModuleRow]:
        """Shape, number of components and explained share of every module."""
        return [
            ModuleRow(name, (bank.out_features, bank.in_features), bank.sides, bank.explained_share)
            for name, bank in self.items()
        ]

    def save_pretrained(self, save_directory: str | Path, *, overwrite: bool = False) -> None:
        """Write `subspace_config.json`, `subspace.safetensors` and a model card; whole or not at all.

        Args:
            save_directory: Folder to make.
            overwrite: Whether to replace another subspace there, which must have been written by eigenpeft. Saving the same
                subspace again changes nothing and needs no permission.

        Raises:
            ArtifactError: If the folder cannot be written, or holds something that is not replaced.
        """
        self._write_to(Path(save_directory), overwrite=overwrite)
        self.origin, self.revision = str(save_directory), None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        fingerprint: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "PrincipalSubspace":
        """Read a subspace from a local folder or from the Hub and check it.

        Args:
            path_or_id: Folder, or Hub id `owner/name`, of a subspace or of a store (whose bases are read).
            revision: Hub branch, tag or commit.
            fingerprint: The fingerprint it must have, or have had before it grew (then it is read as it was); None takes any.
            token: Hub token; None takes the logged-in one.
            cache_dir: Hub cache.
            local_files_only: Use the Hub cache alone.

        Raises:
            SubspaceNotFoundError: If there is none at that place; the message lists where it looked.
            ArtifactError: If files are missing, truncated or altered, or have another fingerprint.
            SubspaceError: If its tensors do not fit each other.
        """
        options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        where = storage.locate(
            path_or_id, storage.SUBSPACE, storage.STORE_1, local_files_only=local_files_only, **options
        )
        subspace = read_subspace(where)
        if fingerprint is not None and subspace.fingerprint != fingerprint:
            earlier = subspace.earlier(fingerprint)
            if earlier is not None:
                earlier.origin, earlier.revision = subspace.origin, subspace.revision
                return earlier
            raise ArtifactError(
                f"The subspace at {str(path_or_id)!r} has fingerprint {subspace.fingerprint}, but {fingerprint} is asked "
                "for: it is another subspace, or another revision of it. Get the one that belongs to it."
            )
        return subspace

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        modules: Iterable[str],
        info: SubspaceInfo,
        shared_banks: Mapping[str, str] | None = None,
        paired_banks: Iterable[str] = (),
    ) -> "PrincipalSubspace":
        """Put a subspace together from `{"<bank>.<field>": tensor}`.

        Args:
            tensors: As `tensors()` gives them.
            modules: Names, in order.
            info: Where it comes from.
            shared_banks: Module to the earlier module whose bank it shares; None shares nothing, as in format 1.
            paired_banks: The banks of paired directions.

        Raises:
            ArtifactError: If a tensor is missing or left over, or a bank that is shared or paired is not there.
            SubspaceError: If the tensors of a bank do not fit each other.
        """
        banks = banks_from_tensors(tensors, modules=modules, shared_banks=shared_banks, paired_banks=paired_banks)
        return cls(banks, info=info)

    def _shared(self) -> dict[str, str]:
        return {module: bank for module, bank in self._bank_of.items() if module != bank}

    def _write_to(self, folder: Path, *, overwrite: bool = False) -> None:
        config, tensors, card = self.config(), self.tensors(), self.card()
        storage.write_artifact(folder, storage.SUBSPACE, config=config, tensors=tensors, card=card, overwrite=overwrite)


def read_subspace(where: storage.Location) -> PrincipalSubspace:
    """The subspace of a located artifact: its own, or the one that a store of format 1 carries.

    Args:
        where: Place of the artifact.

    Raises:
        ArtifactError: If a part is missing, or the tensors do not have the hash that the config names.
        SubspaceError: If the tensors of a bank do not fit each other.
    """
    saved = read_banks(where)
    subspace = PrincipalSubspace(saved.modules, info=saved.info)
    if subspace.fingerprint != saved.fingerprint:
        raise ArtifactError(
            f"The tensors of the {where.kind.label} at {where.origin!r} have fingerprint {subspace.fingerprint}, its "
            f"{where.kind.config_name} says {saved.fingerprint}: a file was altered. Get a fresh copy."
        )
    subspace.origin, subspace.revision = where.origin, where.revision
    return subspace
