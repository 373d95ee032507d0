"""Collections of LoRA adapters of one base model: opened by their headers, read one module at a time."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from huggingface_hub.utils import tqdm
from torch import Tensor

from eigenpeft.collection.adapter import AdapterFactors, OpenAdapter, SourceAdapter
from eigenpeft.collection.alignment import align_modules
from eigenpeft.collection.checks import problems_between
from eigenpeft.collection.diagnosis import Diagnosis, Finding
from eigenpeft.collection.formats.keys import natural_order
from eigenpeft.collection.headers import findings_of_headers
from eigenpeft.collection.opening import open_adapter, some
from eigenpeft.collection.sources import locate
from eigenpeft.errors import CollectionError

__all__ = ["AdapterCollection", "AdapterFactors", "SourceAdapter"]


class AdapterCollection:
    """LoRA adapters of one base model, checked against each other, their tensors still on disk.

    Ranks, alphas and adapted modules may differ. Modules have one name each, that of the module in the base model
    ("transformer.h.0.attn.c_attn"). Made by `from_pretrained`; iterating gives the adapters' names.

    Args:
        adapters: Opened adapters with unique names and aligned module names.

    Attributes:
        adapters: Record of each adapter.
        names: Their names.
        modules: All modules that any of them adapts, in natural order.
        shapes: Module name to (out_features, in_features).
        base_model: The base model that (most of) the configs name.
        base_model_revision: The revision of it that (most of) the configs name, None where none does.

    Examples:
        >>> from eigenpeft.demo import shipped_adapters
        >>> collection = AdapterCollection.from_pretrained(shipped_adapters())
        >>> len(collection), len(collection.modules), collection.shapes[collection.modules[0]]
        (10, 12, (384, 384))
    """

    def __init__(self, adapters: Sequence[OpenAdapter]):
        self._opened = {adapter.info.name: adapter for adapter in adapters}
        self._of_module: dict[str, list[OpenAdapter]] = {}
        for adapter in adapters:
            for module in adapter.locations:
                self._of_module.setdefault(module, []).append(adapter)
        self.adapters = tuple(adapter.info for adapter in adapters)
        self.names = tuple(self._opened)
        self.modules = tuple(sorted(self._of_module, key=natural_order))
        self.shapes = {module: self._of_module[module][0].locations[module].shape for module in self.modules}
        bases = Counter(info.base_model for info in self.adapters if info.base_model)
        self.base_model = bases.most_common(1)[0][0] if bases else None
        revisions = Counter(info.base_model_revision for info in self.adapters if info.base_model_revision)
        self.base_model_revision = revisions.most_common(1)[0][0] if revisions else None

    @classmethod
    def from_pretrained(
        cls,
        adapters: str | Path | Sequence[str | Path],
        *,
        base_model: str | None = None,
        allow_different_base_models: bool = False,
        embeddings: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool | None = None,
    ) -> "AdapterCollection":
        """Open adapters by their configs and headers; no tensor is read yet.

        Args:
            adapters: Folders of adapters, folders whose direct subfolders are adapters, and Hub ids ("owner/name",
                "owner/name@revision", or "owner/name/subfolder" for an adapter inside a repository), one or many, in any
                mix. What exists on disk is taken from disk. An adapter that is named twice counts once. Adapters are
                named after their folder or repository; namesakes get their parent's name in front.
            base_model: Hub id of the base model of adapters whose configs name none or a folder, such as one of the machine that
                they were trained on. An adapter that names another Hub id is refused as ever.
            allow_different_base_models: Take adapters whose configs name different base models (or local copies of one
                model under different paths), as long as shapes fit.
            embeddings: Read the factors of embeddings too, as updates (embedding_dim, num_embeddings) with one input feature
                per token; all adapters must then have the same vocabulary. False keeps them aside.
            token: Token for the Hub; default: the stored one.
            cache_dir: Download cache; default: the Hub's.
            local_files_only: Use downloaded files only; default: only where HF_HUB_OFFLINE is set.

        Returns:
            The collection. `diagnose` reports what is odd without being an error.

        Raises:
            CollectionError: One message with every problem of every adapter: no LoRA, a variant of LoRA whose update is
                not s B A, missing or damaged files, a config that disagrees with the tensors, other base models, shapes
                that conflict.

        Example:
            >>> from peft import LoraConfig, get_peft_model
            >>> from torch import nn
            >>> for name in ("legal", "sports"):
            ...     model = nn.Sequential(nn.Linear(8, 4))
            ...     get_peft_model(model, LoraConfig(r=2, target_modules=["0"])).save_pretrained(f"adapters/{name}")
            >>> collection = AdapterCollection.from_pretrained("adapters")
            >>> collection.names, collection.shapes
            (('legal', 'sports'), {'0': (4, 8)})
            >>> [tuple(read.lora_B.shape) for read in collection.factors("0")]
            [(4, 2), (4, 2)]
        """
        locations, problems = locate(
            adapters, token=token, cache_dir=cache_dir, local_files_only=bool(local_files_only)
        )
        opened: list[OpenAdapter] = []
        for location in locations:
            adapter, found = open_adapter(location, embeddings=embeddings)
            problems += found
            opened += [] if adapter is None else [adapter if base_model is None else adapter.of_base(base_model)]
        names = align_modules(
            [{module: location.shape for module, location in adapter.locations.items()} for adapter in opened]
        )
        opened = [adapter.renamed(names) for adapter in opened]
        problems += problems_between(opened, allow_different_base_models=allow_different_base_models)
        if not opened and not problems:
            problems = ["No adapters were named: pass at least one folder or Hub id."]
        if problems:
            raise CollectionError(problems)
        return cls(opened)

    def factors(self, module: str, *, names: Iterable[str] | None = None) -> list[AdapterFactors]:
        """Read one module's factors of all adapters that have it, scaling folded in; nothing else is read.

        Args:
            module: Name from `modules`.
            names: Read these adapters of the collection alone; those that lack the module are passed over. Defaults to all.

        Returns:
            One pair per adapter, all of one dtype: float64 if a file has that, else float32.

        Raises:
            KeyError: If no adapter adapts a module of that name.
            CollectionError: If a name is unknown; or if a factor holds NaN or infinity, or a file cannot be read any more: one
                message names all such adapters.
        """
        read = list(self.each_factors(module, names=names))
        if len({factors.lora_A.dtype for factors in read}) > 1:  # so that the factors of a module can be stacked
            return [replace(each, lora_A=each.lora_A.double(), lora_B=each.lora_B.double()) for each in read]
        return read

    def each_factors(self, module: str, *, names: Iterable[str] | None = None) -> Iterator[AdapterFactors]:
        """`factors` one adapter after another, each read when it is asked for; dtypes are those of each file.

        Args:
            module: Name from `modules`.
            names: As for `factors`.

        Raises:
            KeyError: If no adapter adapts a module of that name.
            CollectionError: If a name is unknown; or as `factors`, after the last adapter that can be read.
        """
        problems = []
        wanted = None if names is None else set(names)
        self._check_names(wanted or ())
        for adapter in self._having(module):
            if wanted is not None and adapter.info.name not in wanted:
                continue
            try:
                read = adapter.read(module)
            except ValueError as error:
                problems.append(f"Adapter {adapter.info.name!r} {error}.")
                continue
            yield read
        if problems:
            raise CollectionError(problems)

    def read_kept_aside(self, name: str) -> dict[str, Tensor]:
        """Read the tensors of one adapter that are not part of an update: heads, biases, trained tokens.

        Args:
            name: Name of the adapter.

        Returns:
            Tensors in their stored dtype and shape (a head's weight is (n_labels, hidden_size)), by key of the adapter's file.

        Raises:
            CollectionError: If the name is unknown, or a tensor cannot be read any more.
        """
        self._check_names([name])
        adapter = self._opened[name]
        try:
            keys = adapter.info.kept_aside
            return dict(zip(keys, adapter.weights.read_many(*keys), strict=True))
        except ValueError as error:
            raise CollectionError([f"Adapter {name!r} {error}."]) from error

    def aligned(self, name: str) -> dict[str, str]:
        """Names of modules in an adapter's own file to their names here, where these differ.

        Args:
            name: Name of the adapter.

        Raises:
            CollectionError: If the name is unknown.
        """
        self._check_names([name])
        return dict(self._opened[name].aligned)

    def names_with(self, module: str) -> tuple[str, ...]:
        """Names of the adapters that adapt a module.

        Args:
            module: Name from `modules`.

        Raises:
            KeyError: If no adapter adapts a module of that name.
        """
        return tuple(adapter.info.name for adapter in self._having(module))

    def ranks(self, module: str) -> dict[str, int]:
        """Rank of each adapter that adapts a module, from the headers.

        Args:
            module: Name from `modules`.

        Raises:
            KeyError: If no adapter adapts a module of that name.
        """
        return {
            adapter.info.name: adapter.weights.shapes[adapter.locations[module].key_A][0]
            for adapter in self._having(module)
        }

    def fan_in_fan_out(self, module: str) -> bool:
        """Whether the base weight of a module is stored transposed (GPT-2's Conv1D), as the adapters' configs say.

        The factors are lora_A (r, in_features) and lora_B (out_features, r) either way.

        Args:
            module: Name from `modules`.

        Raises:
            KeyError: If no adapter adapts a module of that name.
        """
        return any(adapter.fan_in_fan_out for adapter in self._having(module))

    def is_embedding(self, module: str) -> bool:
        """Whether a module is an embedding, whose input features are tokens.

        Args:
            module: Name from `modules`.

        Raises:
            KeyError: If no adapter adapts a module of that name.
        """
        return any("lora_embedding_" in adapter.locations[module].key_A for adapter in self._having(module))

    def layout_fingerprint(self, name: str) -> str:
        """SHA-256 of how an adapter's factors are read: places, shapes and scalings of its modules, as its config has them.

        Args:
            name: Adapter. With the hash of its weights file this says everything that its updates depend on.

        Raises:
            CollectionError: If the name is unknown.
        """
        self._check_names([name])
        adapter = self._opened[name]
        modules = {module: asdict(location) for module, location in adapter.locations.items()}
        text = json.dumps([modules, adapter.fan_in_fan_out], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def subset(self, names: Iterable[str]) -> "AdapterCollection":
        """The same adapters, fewer of them; files already open are shared.

        Args:
            names: Names to keep, in the order wanted.

        Raises:
            CollectionError: If a name is unknown, or none is given.
        """
        names = list(dict.fromkeys(names))
        self._check_names(names)
        if not names:
            raise CollectionError([f"No adapter would be left of the {len(self)}: name at least one to keep."])
        return AdapterCollection([self._opened[name] for name in names])

    def without(self, *names: str) -> "AdapterCollection":
        """The same adapters but some.

        Args:
            *names: Names to leave out.

        Raises:
            CollectionError: If a name is unknown, or none would be left.
        """
        self._check_names(names)
        return self.subset(name for name in self.names if name not in names)

    def diagnose(self, *, progress: bool = True) -> tuple[Finding, ...]:
        """Look for what spoils a subspace without being an error; reads every adapter once, module by module.

        `SubspaceBuilder` does the same while it fits, so that this is for looking first.

        Args:
            progress: Show a progress bar.

        Returns:
            Findings from the headers (tensors kept aside, missing modules, aligned names), then those from the tensors
            (untrained, outlier_norm, same_start, near_duplicate; see `Diagnosis`).

        Raises:
            CollectionError: If a factor holds NaN or infinity, or a file cannot be read any more.
        """
        diagnosis = Diagnosis()
        for module in tqdm(self.modules, desc="Looking", unit="module", disable=not progress):
            diagnosis.observe(module, factors=self.factors(module))
        return (*self.findings, *diagnosis.findings())

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the headers alone tell: tensors kept aside, modules missing from some adapters, names aligned."""
        return findings_of_headers(tuple(self._opened.values()))

    def close(self) -> None:
        """Let go of the files. Reading afterwards opens them again."""
        for adapter in self._opened.values():
            adapter.weights.close()

    def __enter__(self) -> "AdapterCollection":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._opened)

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened)

    def __contains__(self, name: object) -> bool:
        return name in self._opened

    def __getitem__(self, name: str) -> SourceAdapter:
        """Record of one adapter.

        Raises:
            CollectionError: If the name is unknown.
        """
        self._check_names([name])
        return self._opened[name].info

    def __repr__(self) -> str:
        return f"AdapterCollection(adapters={len(self)}, modules={len(self.modules)}, base_model={self.base_model!r})"

    def _having(self, module: str) -> list[OpenAdapter]:
        if module not in self._of_module:
            raise KeyError(
                f"{module!r} is not adapted by any of the {len(self)} adapters, which adapt {some(self.modules)}; ask for "
                "one of those"
            )
        return self._of_module[module]

    def _check_names(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self._opened]
        if unknown:
            raise CollectionError(
                [f"{some(unknown)} is not in the collection, which has {some(self.names, limit=20)}."]
            )
