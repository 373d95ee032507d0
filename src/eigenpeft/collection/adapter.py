"""One source adapter: its record, where its factors lie, and reading them one module at a time."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenpeft.artifacts.reading import Stamp, is_folder
from eigenpeft.collection.base_models import hub_id
from eigenpeft.collection.formats.keys import natural_order
from eigenpeft.collection.formats.weights import WeightsFile, file_sha256
from eigenpeft.errors import CollectionError

_LARGEST = 1e60


@dataclass(frozen=True)
class AdapterFactors:
    """Factors of one adapter on one module: ΔW = lora_B @ lora_A.

    Attributes:
        adapter: Name of the adapter.
        lora_A: (r, in_features), float32, or float64 where a file of the module has it.
        lora_B: (out_features, r), likewise, with the scaling (alpha / r, alpha / sqrt(r) for rsLoRA) folded in.
    """

    adapter: str
    lora_A: Tensor
    lora_B: Tensor


@dataclass(frozen=True, kw_only=True)
class SourceAdapter:
    """What is known of one adapter without reading its tensors.

    Attributes:
        name: Label, unique in the collection.
        source: What the user named: a folder or a Hub id.
        revision: Commit of a Hub repository, None for local folders.
        base_model: Base model that the config names.
        rank: Largest rank of its modules.
        lora_alpha: The config's alpha; single modules may differ by `alpha_pattern`.
        use_rslora: Whether the scaling is alpha / sqrt(r).
        task_type: PEFT's task type.
        license: From the front matter of its README.md.
        modules: Canonical names of the modules it adapts, in natural order.
        kept_aside: Keys of its tensors that are not part of an update: heads, saved modules, biases, embedding factors.
        weights_path: Its weights file.
        weights_stamp: The state of that file when its header was read.
        base_model_revision: Revision of the base model that the config names.
    """

    name: str
    source: str
    revision: str | None
    base_model: str | None
    rank: int
    lora_alpha: float
    use_rslora: bool
    task_type: str | None
    license: str | None
    modules: tuple[str, ...]
    kept_aside: tuple[str, ...]
    weights_path: str
    weights_stamp: Stamp | None = None
    base_model_revision: str | None = None

    @property
    def licence(self) -> str | None:
        """The old name of `license`, deprecated."""
        warnings.warn(
            "SourceAdapter.licence is deprecated and goes away in the next minor version; use SourceAdapter.license.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.license

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights file; read when first asked for.

        Raises:
            CollectionError: If the file is not the one any more whose header was read.
        """
        try:
            return file_sha256(self.weights_path, expected=self.weights_stamp)
        except (OSError, ValueError) as error:
            raise CollectionError([f"Adapter {self.name!r} {error}."]) from error

    def record(self) -> dict[str, Any]:
        """What is written into artifacts made from this adapter, as JSON-able values.

        Of a local folder only its own name is kept, because artifacts get published. Modules are counted, not listed.

        Raises:
            CollectionError: If the file is not the one any more whose header was read.
        """
        record = asdict(self)
        for name in ("weights_path", "weights_stamp", "modules", "kept_aside"):
            del record[name]
        record["base_revision"] = record.pop("base_model_revision")  # the key that files have
        return {
            **record,
            "source": self.source if self.revision else Path(self.weights_path).resolve().parent.name,
            "sha256": self.sha256,
            "n_modules": len(self.modules),
            "kept_aside": list(self.kept_aside),
        }


@dataclass(frozen=True)
class FactorLocation:
    """Where the factors of one module lie in a weights file.

    Attributes:
        key_A: Key of lora_A.
        key_B: Key of lora_B.
        shape: (out_features, in_features).
        scaling: s of s B A.
    """

    key_A: str
    key_B: str
    shape: tuple[int, int]
    scaling: float


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter whose header has been read and whose factors can be read one module at a time.

    Attributes:
        info: Its record.
        weights: Its weights file.
        locations: Canonical module name to its factors' place.
        fan_in_fan_out: Whether its config says that base weights are stored transposed.
        aligned: Names of modules in its own file to their names here, where these differ.
        unknown_fields: Fields of its config that nobody here knows.
    """

    info: SourceAdapter
    weights: WeightsFile
    locations: Mapping[str, FactorLocation]
    fan_in_fan_out: bool
    aligned: Mapping[str, str] = field(default_factory=dict)
    unknown_fields: tuple[str, ...] = ()

    def renamed(self, names: Mapping[str, str]) -> "OpenAdapter":
        """The same adapter with other names for some modules.

        Args:
            names: Old name to new name.
        """
        locations = {names.get(module, module): location for module, location in self.locations.items()}
        modules = tuple(sorted(locations, key=natural_order))
        aligned = {old: new for old, new in names.items() if old in self.locations}
        return replace(self, info=replace(self.info, modules=modules), locations=locations, aligned=aligned)

    def of_base(self, base_model: str) -> "OpenAdapter":
        """The same adapter with this base model, if its config names none, or a folder.

        Args:
            base_model: Hub id.
        """
        named = self.info.base_model
        if named and hub_id(named) is not None and not is_folder(named):
            return self
        return replace(self, info=replace(self.info, base_model=base_model, base_model_revision=None))

    def read(self, module: str) -> AdapterFactors:
        """Read the factors of one module, fold the scaling and check that all numbers are finite.

        Args:
            module: Canonical name.

        Raises:
            ValueError: If the file cannot be read any more, or a factor holds NaN or infinity; the message is a clause
                to put behind the adapter's name.
        """
        location = self.locations[module]
        lora_A, lora_B = self.weights.read_many(location.key_A, location.key_B)
        dtype = torch.float64 if torch.float64 in (lora_A.dtype, lora_B.dtype) else torch.float32
        # Folded after the cast: in float16 the product could overflow or round.
        lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype) * location.scaling
        for factor, values in (("lora_A", lora_A), ("lora_B", lora_B)):
            # NaN and infinity reach the sum, at a tenth of the cost of asking every number.
            if not values.sum().isfinite() and not values.isfinite().all():
                n_bad = int((~values.isfinite()).sum())
                raise ValueError(
                    f"has {n_bad} of {values.numel()} numbers NaN or infinite in {factor} of {module!r}; it diverged or "
                    "was damaged, leave it out"
                )
            # Only float64 reaches so far, and the squares of updates leave it.
            if dtype == torch.float64 and values.numel() and (largest := float(values.abs().max())) > _LARGEST:
                raise ValueError(
                    f"has numbers as large as {largest:.3g} in {factor} of {module!r}; it diverged, leave it out"
                )
        return AdapterFactors(adapter=self.info.name, lora_A=lora_A, lora_B=lora_B)
