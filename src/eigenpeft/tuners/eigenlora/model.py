"""EigenLoRA as a PEFT tuner: LoRA's layers with both factors replaced by coefficients on frozen components."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from eigenpeft.collection.formats.keys import without_wrappers
from eigenpeft.errors import AdapterConfigError
from eigenpeft.subspace.cores import core_kind
from eigenpeft.subspace.matching import match_modules
from eigenpeft.tuners.eigenlora.bases import Injection, bank_for, find_bases, matching_modules
from eigenpeft.tuners.eigenlora.combining import (
    can_combine,
    check_core_rule,
    combine,
    combine_cores,
    is_core_rule,
    with_offsets,
)
from eigenpeft.tuners.eigenlora.config import START_FIELDS, EigenLoraConfig
from eigenpeft.tuners.eigenlora.embedded import embedded_counts, embedded_tensors, fill_embedded
from eigenpeft.tuners.eigenlora.frozen import check_frozen, check_one_core, empty_offset, offset_ranks
from eigenpeft.tuners.eigenlora.layer import adopt
from eigenpeft.tuners.eigenlora.mixture import read_mixture
from eigenpeft.tuners.eigenlora.placing import place, start, warn_of_idle_rank
from eigenpeft.tuners.eigenlora.warm_start import read_warm_start
from eigenpeft.tuners.host.factor_model import FactorModel, sum_biases
from eigenpeft.tuners.host.target_names import excluding, strays
from eigenpeft.tuners.layers.kinds import kind_of
from eigenpeft.tuners.layers.shared_bases import drop_unused_bases


class EigenLoraModel(FactorModel):
    """Tuner behind `EigenLoraConfig`; made by `get_peft_model`."""

    @classmethod
    @contextmanager
    def injecting(cls, model: nn.Module, *, config: EigenLoraConfig, adapter_name: str) -> Iterator[Injection]:
        """Open subspace and sources once, and choose the modules when no targets are named; afterwards note what is embedded.

        Into the configuration goes, here alone, what its file must say: which subspace, the names of sources, the targets,
        what is embedded.

        Args:
            model: Model to adapt.
            config: Configuration of the adapter.
            adapter_name: The adapter.

        Yields:
            What `swap` needs for every layer.

        Raises:
            AdapterConfigError: If no subspace is named, it fits the model in no module, or `init_from`, `sources` or their
                options do not fit it.
            ArtifactError: If one of them is damaged.
            CollectionError: If the adapters of `init_from` cannot be read.
            SubspaceError: If the subspace, or the store of `sources` or `init_from`, is nowhere, or its tensors do not fit each
                other.
        """
        opened = find_bases(**config.named_bases)
        subspace = opened.subspace
        if subspace is not None:
            if config.subspace is None and config.subspace_sha256 is None:
                config.name_subspace(subspace)  # the sources' own subspace
            config.subspace_sha256 = subspace.fingerprint
            most = max(bank.n_components for bank in subspace.values())
            n_components = min(most, config.n_components or most)
            warn_of_idle_rank(config.r, core=core_kind(config.core), n_components=n_components)
        shapes = None
        if subspace is not None:
            shapes = {name: (bank.out_features, bank.in_features) for name, bank in subspace.items()}
        matches = match_modules(model, shapes or config.embedded_n_components or (), shapes=shapes)
        if config.target_modules is None and not config.target_parameters:
            layers = {"layers_to_transform": config.layers_to_transform, "layers_pattern": config.layers_pattern}
            found = matching_modules(model, matches, **layers)
            wanted = {without_wrappers(name) for name in found}
            config.target_modules = wanted  # pyright: ignore[reportAttributeAccessIssue]
            config.exclude_modules = excluding(config.exclude_modules, strays(model, wanted))
        if subspace is not None and subspace.info.fan_in_fan_out:
            config.fan_in_fan_out = True  # the adapters' Conv1D; PEFT would set it with a warning
        warm_start = None
        if config.init_from and subspace:
            warm_start = read_warm_start(
                str(config.init_from),
                subspace,
                adapters=config.start_adapters,
                scale=config.init_scale,
                options=config.init_options,
                keeps_offset=config.init_offset,
            )
        mixture = None
        if core_kind(config.core).weighs_sources:
            mixture = read_mixture(
                opened.sources,
                subspace=subspace,
                names=config.source_names,
                init_weights=config.init_weights,
                per_module=config.weights == "module",
                is_read_back=config.is_from_file or config.has_started,
            )
            config.source_names = list(mixture.names)
        given = Injection(
            subspace,
            warm_start,
            mixture,
            matches.found,
            core_kind(config.core),
            n_components=config.n_components,
            embedded=config.embedded_n_components or {},
            fingerprint=config.subspace_sha256 or "",
        )
        yield given
        if warm_start is not None:
            warm_start.report(given.placed, warm_start.fill_heads(model, adapter_name))
        config.note_start()
        config.offset_ranks = offset_ranks(model, adapter_name)
        if config.embeds_subspace:
            config.embedded_n_components = embedded_counts(model, adapter_name)

    @staticmethod
    def swap(layer: LoraLayer, *, config: EigenLoraConfig, adapter_name: str, module: str, given: Injection) -> None:
        """`FactorModel.swap`: coefficients on the module's components in the place of both of LoRA's factors.

        Raises:
            AdapterConfigError: If the subspace does not fit the layer, another layer has taken its bases, or a warm start is not
                defined for it.
            SubspaceError: If `n_components` is more than the subspace has.
        """
        name, frozen_bank = bank_for(layer, given, module)
        given.place(name, module)
        core, scaling = given.core, layer.scaling[adapter_name]
        if given.mixture is not None:
            check_one_core(layer, module, what="core='mixture'", instead="use another core")
            mixture = given.mixture.of(name, frozen_bank)
            place(layer, adapter_name, frozen_bank=frozen_bank, parts={}, core=core, mixture=mixture)
            adopt(layer, adapter_name)
            return
        init: Any = config.init_lora_weights
        parts = start(layer, adapter_name, frozen_bank=frozen_bank, core=core, init=init, module=module)
        offset = empty_offset(layer, (config.offset_ranks or {}).get(module), module=module)
        if given.warm_start is not None and name in given.warm_start.modules:
            _check_warm_start(layer, given.warm_start.source, module)
            parts = given.warm_start.parts(name, start=parts, core=core, scaling=scaling)
            offset = given.warm_start.offset(name, parts, core=core, scaling=scaling, frozen_bank=frozen_bank)
        if offset is not None:
            check_one_core(layer, module, what="init_offset=True", instead="pass init_offset=False")
        place(layer, adapter_name, frozen_bank=frozen_bank, parts=parts, core=core, offset=offset)
        adopt(layer, adapter_name)

    @classmethod
    def has_matrices(cls, config: EigenLoraConfig) -> bool:
        """`FactorModel.has_matrices`: a diagonal has one axis, and so have weights.

        Args:
            config: Configuration of the adapter.
        """
        shapes = core_kind(config.core).shapes(n_components_in=1, n_components_out=1, rank=1)
        return all(len(shape) > 1 for shape in shapes.values())

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Any = "svd",
        svd_rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Combine adapters into a new one: in coefficient space, exactly, where that can be; else into a plain LoRA.

        Adapters of one core on the same bases stay EigenLoRA with "linear", "cat" and "svd". The cores "full" and
        "diagonal" have no factors to choose between, and all three give the weighted sum of the updates itself; "ties",
        "dare_ties", "dare_linear" and "magnitude_prune" work on the entries of their coefficients. The rules of
        `eigenpeft.linalg.merging.RULES` that need no data ("tsv", "iso_c", "svc", "pico", ...) merge the cores themselves,
        at the rank `svd_rank` for "low_rank"; `scale` and the rule's options are further arguments. Other combinations work
        on LoRA's factors or on the update's entries, and what they make leaves the subspace.

        Args:
            adapters: Names of the adapters to combine.
            weights: One per name; negative ones subtract.
            adapter_name: Name of the new adapter.
            combination_type: PEFT's own: "svd", "linear", "cat", "ties", and so on.
            svd_rank: PEFT's own: rank of the new adapter with "svd"; None takes the largest of the sources.
            **kwargs: PEFT's own.

        Raises:
            ValueError: If an adapter is not there, or what PEFT itself refuses.
            AdapterConfigError: If an adapter uses something that no combination keeps, or the rule cannot combine these.
        """
        if adapter_name in self.peft_config:
            return
        self._check_alike(adapters)
        configs = [self.peft_config[name] for name in adapters if name in self.peft_config]
        by_rule = is_core_rule(combination_type) and 0 < len(configs) == len(adapters)
        if by_rule:
            check_core_rule(self.model, configs=configs, adapters=adapters, combination=combination_type)
        checked = self._check_add_weighted_adapter(adapters, "svd" if by_rule else combination_type, svd_rank)
        if not by_rule and not can_combine(
            self.model, configs=[self.peft_config[name] for name in adapters], adapters=adapters, combination=checked[0]
        ):
            combination_type, svd_rank = with_offsets(
                self.model, configs=configs, adapters=adapters, combination=combination_type, rank=svd_rank
            )
            super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, svd_rank=svd_rank, **kwargs)
            return
        combination, rank, target_modules = checked
        settings = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
        own: Any = self.peft_config[adapters[0]]
        # A weighted sum of mixtures is a core of its own: what they weigh may differ.
        made_of = {"core": "full", "source_names": None} if core_kind(own.core).weighs_sources else {}
        self.peft_config[adapter_name] = replace(
            own, target_modules=target_modules, **dict.fromkeys(START_FIELDS), **settings, **made_of
        )
        self.inject_adapter(self.model, adapter_name)
        if by_rule:
            core = self.peft_config[adapter_name].core  # pyright: ignore[reportAttributeAccessIssue]
            combine_cores(
                self.model,
                adapters=adapters,
                weights=weights,
                new=adapter_name,
                core=core,
                combination=combination_type,
                **kwargs,
            )
            return
        options = {name: kwargs[name] for name in ("density", "majority_sign_method") if name in kwargs}
        combine(self.model, adapters=adapters, weights=weights, new=adapter_name, combination=combination, **options)
        sum_biases(self.model, adapters=adapters, weights=weights, new=adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the bases that no other adapter uses.

        Args:
            adapter_name: Adapter to delete.
        """
        super().delete_adapter(adapter_name)
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                drop_unused_bases(layer)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return selected | (embedded_tensors(model, adapter_name) if config.embeds_subspace else {})

    @classmethod
    def _remove_adapter_name_from_key(cls, key, adapter_name):
        # Embedded components are every adapter's, and an adapter may be called "components".
        return key if key.endswith(".components") else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        coefficients = {key: value for key, value in state_dict.items() if not key.endswith(".components")}
        embedded = {key: value for key, value in state_dict.items() if key.endswith(".components")}
        fill_embedded(model, adapter_name, embedded)
        check_frozen(model, adapter_name, coefficients)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, coefficients)


def _check_warm_start(layer: LoraLayer, source: str, module: str) -> None:
    kind = kind_of(layer)
    n_blocks = kind.n_blocks(layer)
    if n_blocks > 1:
        what = f"{n_blocks} {kind.blocks}"
        raise AdapterConfigError(
            f"init_from={source!r} is one update for {module!r}, which has {what} with updates of their own; "
            "leave it out with exclude_modules, or leave init_from out."
        )
