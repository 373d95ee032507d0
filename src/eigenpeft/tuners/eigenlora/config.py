"""Configuration of EigenLoRA."""

import logging
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.merging import RULES
from eigenpeft.subspace import AdapterStore, PrincipalSubspace
from eigenpeft.subspace.cores import CORES, RENAMED, core_kind
from eigenpeft.tuners.eigenlora.merged_start import check_rule, named
from eigenpeft.tuners.host.adapter_card import ExplainedConfig
from eigenpeft.tuners.host.registration import peft_type
from eigenpeft.tuners.host.restrictions import check_lora_options
from eigenpeft.tuners.layers.shared_bases import remember

logger = logging.getLogger(__name__)
# Starts that write A and B from the base model's weights, which lie in no subspace; and layers that the subspace has not.
_BEYOND_THE_SUBSPACE = ("layer_replication", "loftq_config", "corda_config", "lora_ga_config")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# How an adapter starts: a file's numbers take the place of these, and they could name anything of the reader's.
START_FIELDS = ("init_from", "init_adapters", "init_scale", "init_options", "init_offset", "init_weights", "sources")
NO_STORE = (
    "sources={!r} are adapters and no store: put them into one with "
    "AdapterStore.from_collection(subspace, AdapterCollection.from_pretrained(...))."
)
# What the scaling of a mixture is made of; its weights are the scaling.
_NO_SCALING = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}


@dataclass
class EigenLoraConfig(ExplainedConfig):
    """Train coefficients on the frozen components of a principal subspace: `ΔW = s·V_outᵀ M V_in`.

    EigenLoRAx (arXiv 2502.04700, equation 4), whose layer has `M = C_out C_in` (`core="low_rank"`).

    All of `peft.LoraConfig`'s fields apply; `target_modules` defaults to the subspace's modules, and `r` also sets the
    scaling `s = lora_alpha / r` (or `/ sqrt(r)` with `use_rslora`) of the cores that have no rank of their own.

    Making one opens nothing: folders and Hub ids are looked up when a model is made.

    With `use_bdlora` each block takes its own part of the components and of the coefficients: the update is the
    block-diagonal part of one of the factors, and leaves the subspace, so that no store keeps it.

    Raises:
        AdapterConfigError: If a field has a value that the method does not define.
        SubspaceNotFoundError: When a model is made and the subspace is nowhere; the message lists the places searched.

    Examples:
        >>> from eigenpeft import EigenLoraConfig
        >>> EigenLoraConfig(subspace="my-subspace", r=8, core="full").core
        'full'
    """

    method_name = "EigenLoRA"

    subspace: str | PrincipalSubspace | None = field(
        default=None,
        metadata={"help": "Path or Hub id of the subspace (or of an adapter store), or the PrincipalSubspace itself."},
    )
    subspace_revision: str | None = field(default=None, metadata={"help": "Hub revision of the subspace."})
    subspace_sha256: str | None = field(
        default=None,
        metadata={"help": "Fingerprint that the subspace must have; set by itself when the adapter is made."},
    )
    n_components: int | None = field(
        default=None, metadata={"help": "Use only the first n_components of each module; None uses all."}
    )
    core: Literal["low_rank", "full", "diagonal", "mixture"] = field(
        default="low_rank",
        metadata={
            "help": "Form of M (K_out, K_in). 'low_rank': C_out C_in with r (K_in + K_out) parameters per module, the default as "
            "in EigenLoRAx (arXiv 2502.04700); "
            "'full': all K_in K_out entries (LoRA-XS); 'diagonal': K entries (Compress then Serve). These start at ΔW = 0. "
            "'mixture': Σ w_t M_t of the frozen cores of the members of `sources`, with trained weights (LoRA-Soups). 'mixer', the "
            "old name of 'full', is deprecated."
        },
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Warm start: folder or Hub id of an adapter of LoRA, which is projected onto the subspace, or of EigenLoRA "
            "in it, or of a merge that `eigenpeft merge` wrote; '<folder or Hub id of a store>#<member>'; or a merging rule "
            "such as 'mean', for the adapters of `init_adapters`. The adapter's own file does not name it: reloading needs no "
            "source."
        },
    )
    init_adapters: Any = field(
        default=None,
        metadata={
            "help": "What a merging rule in `init_from` merges: folder or Hub id of a store, folders and Hub ids of LoRA "
            "adapters, an AdapterStore or an AdapterCollection."
        },
    )
    init_scale: Any = field(
        default=None,
        metadata={
            "help": "λ, which multiplies the update that `init_from` names: a number, or 'auto', which gives each module's "
            "merged update the mean norm of those that were merged (Pico's rule). None is 1, or the rule's own."
        },
    )
    init_options: dict[str, Any] | None = field(
        default=None, metadata={"help": "Options of the merging rule in `init_from`, such as {'density': 0.2}."}
    )
    init_offset: bool | None = field(
        default=None,
        metadata={
            "help": "Whether what the core cannot hold of `init_from` is kept, as a frozen part of the adapter that its file and "
            "its exports contain. None: kept for merges and mixtures, left out for single adapters."
        },
    )
    sources: Any = field(
        default=None,
        metadata={"help": "Store whose members core='mixture' weighs: an AdapterStore, its folder or its Hub id."},
    )
    source_names: list[str] | None = field(
        default=None,
        metadata={"help": "Members of `sources` that are weighed, in order; None takes all. Set by itself."},
    )
    weights: Literal["adapter", "module"] = field(
        default="adapter",
        metadata={
            "help": "Weights of core='mixture': one per source for the whole model, or one per source and module "
            "(LoRA-Soups' CAT, arXiv 2410.13025)."
        },
    )
    init_weights: Any = field(
        default=None,
        metadata={"help": "Where these weights start: one number per source, or one for all. None is 1 / T, the mean."},
    )
    offset_ranks: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Rank of the frozen offset of each module that has one; set by itself (`init_offset`)."},
    )
    save_subspace: Literal["reference", "embed"] = field(
        default="reference",
        metadata={
            "help": "'reference' saves coefficients only and names the subspace; 'embed' saves the components with them. "
            "A subspace that was never saved is always embedded."
        },
    )
    embedded_n_components: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Components of each module in the adapter's own file; set by itself when they are embedded."},
    )

    def __post_init__(self):
        super().__post_init__()
        from_file = self.is_from_file
        self.peft_type = peft_type("EIGENLORA")
        self.has_started = False
        self.read_from: Path | None = None  # the adapter's folder; no field, so that no file says where it was read
        check_lora_options(self, method="EigenLoRA", unsupported=_BEYOND_THE_SUBSPACE)
        if isinstance(self.core, str) and self.core in RENAMED:
            self.core = core_kind(self.core, from_file=from_file, stacklevel=4).name  # pyright: ignore[reportAttributeAccessIssue]
        choices = {"core": tuple(CORES), "save_subspace": ("reference", "embed"), "weights": ("adapter", "module")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise AdapterConfigError(
                    f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, allowed))}."
                )
        self._check_variants()
        if self.n_components is not None and (not isinstance(self.n_components, int) or self.n_components < 1):
            raise AdapterConfigError(
                f"n_components={self.n_components!r} must be None or a whole number of at least 1."
            )
        self._check_reference()
        self._check_start()
        self._take_sources()
        self._subspace: PrincipalSubspace | None = None
        if isinstance(self.subspace, PrincipalSubspace):
            self.name_subspace(self.subspace)
        elif self._sources is not None and self.subspace is None and self.subspace_sha256 is None:
            self.name_subspace(self._sources.subspace)

    def name_subspace(self, subspace: PrincipalSubspace) -> None:
        """Keep a subspace beside the fields, which must stay plain values that JSON and `asdict` can take, and its name in them.

        Its name is its fingerprint, and is computed here because the fields say it at once. The subspace is remembered by it, so
        that a configuration made from these fields (`dataclasses.replace`, `to_dict`, a file) finds it before any model is made.

        Args:
            subspace: An open one.

        Raises:
            AdapterConfigError: If `subspace_sha256` is the fingerprint of another one.
        """
        self._subspace, fingerprint = subspace, remember(subspace)
        if self.subspace_sha256 not in (None, fingerprint):
            raise AdapterConfigError(
                f"subspace_sha256={self.subspace_sha256!r} is not the fingerprint {fingerprint!r} of the subspace "
                "passed; leave it out or pass the subspace that has it."
            )
        self.subspace_sha256, self.subspace_revision = fingerprint, subspace.revision
        self.subspace = subspace.origin or self.sources

    def _check_variants(self) -> None:
        """Refuse variants of LoRA that are defined for the core "low_rank" alone, elsewhere and with a warm start."""
        set_ = [name for name in ("kasa_config", "use_bdlora") if getattr(self, name, None)]
        if set_ and (not core_kind(self.core).is_factored or self.init_from is not None):
            raise AdapterConfigError(
                f"{set_[0]} needs core='low_rank' (here {self.core!r}), whose C_out and C_in are what it works on, and no "
                f"init_from (here {self.init_from!r}), whose update it would change. Change them, or leave {set_[0]} out."
            )

    def _check_reference(self) -> None:
        """Refuse what no adapter's file says of its subspace, before anything is opened or allocated for it."""
        if self.is_from_file:
            found = {name: value for name in START_FIELDS if (value := getattr(self, name)) is not None}
            if found:
                shown = ", ".join(f"{name}={str(value)[:80]!r}" for name, value in found.items())
                logger.warning("%s in an adapter's file is passed over: the adapter has its numbers.", shown)
            for name in found:
                setattr(self, name, None)
        if isinstance(self.subspace, os.PathLike):
            self.subspace = os.fspath(self.subspace)
        if not isinstance(self.subspace, str | PrincipalSubspace | None):
            raise AdapterConfigError(
                f"subspace={str(self.subspace)[:80]!r} must be a path, a Hub id or a PrincipalSubspace."
            )
        if self.subspace_sha256 is not None and not _SHA256.fullmatch(str(self.subspace_sha256)):
            raise AdapterConfigError(
                f"subspace_sha256={str(self.subspace_sha256)[:80]!r} must be 64 hexadecimal digits, or None."
            )
        for name in ("embedded_n_components", "offset_ranks"):
            if not isinstance(getattr(self, name), dict | None):
                raise AdapterConfigError(
                    f"{name}={str(getattr(self, name))[:80]!r} must be None or numbers by module name; the config was altered, "
                    "get a fresh copy of the adapter."
                )
        names = self.source_names
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise AdapterConfigError(f"source_names={str(names)[:80]!r} must be a list of names of members, or None.")

    def _check_start(self) -> None:
        """Refuse starts that mean nothing, and keep beside the fields the values that are not plain."""
        self._init_adapters, self.init_adapters = self.init_adapters, named(self.init_adapters)
        is_rule = self.init_from in RULES and self._init_adapters is not None
        if self.init_from in RULES and not is_rule:
            raise AdapterConfigError(
                f"init_from={self.init_from!r} is a merging rule: say which adapters it merges with init_adapters=. (A folder "
                f"of that name is './{self.init_from}'.)"
            )
        if self._init_adapters is not None and not is_rule:
            raise AdapterConfigError(
                f"init_adapters= needs a merging rule in init_from=, and {self.init_from!r} is not one; pass one of "
                f"{', '.join(map(repr, RULES))}."
            )
        if is_rule:
            check_rule(str(self.init_from), self.init_options)
        elif self.init_options:
            raise AdapterConfigError(
                f"init_options={self.init_options!r} are options of a merging rule; pass init_from='ties' or another."
            )
        scale = self.init_scale
        if scale is not None and scale != "auto" and not _is_number(scale):
            raise AdapterConfigError(f"init_scale={scale!r} must be a finite number, 'auto' or None.")
        if scale is not None and (self.init_from is None or (scale == "auto" and not is_rule)):
            raise AdapterConfigError(
                f"init_scale={scale!r} multiplies what init_from={self.init_from!r} names, and 'auto' compares a merge with "
                "what was merged; pass init_from='mean' and init_adapters=."
            )
        weights = self.init_weights
        if weights is not None and not _is_number(weights):
            if not isinstance(weights, list | tuple) or not all(map(_is_number, weights)):
                raise AdapterConfigError(f"init_weights={weights!r} must be a finite number, a list of them, or None.")
            self.init_weights = list(weights)

    def _take_sources(self) -> None:
        """Check that sources belong to the core, and keep an open store beside the fields; `bases.find_bases` opens the others."""
        self._sources: AdapterStore | None = None
        mixture = core_kind(self.core).weighs_sources
        given = {"sources": self.sources, "init_weights": self.init_weights, "source_names": self.source_names}
        if not mixture and (extra := [name for name, value in given.items() if value is not None]):
            raise AdapterConfigError(
                f"{', '.join(extra)} belong to core='mixture', and core={self.core!r} has none; "
                "leave them out, or pass core='mixture'."
            )
        if mixture and self.init_from is not None:
            raise AdapterConfigError(
                f"init_from={self.init_from!r}: a mixture starts from its sources, with the weights init_weights; leave it out."
            )
        if not mixture:
            return
        scaling = {"lora_alpha": self.r, **_NO_SCALING}
        if changed := [name for name, value in scaling.items() if getattr(self, name) != value]:
            logger.info("core='mixture' has no scaling beside its weights: %s is not used.", ", ".join(changed))
        for name, value in scaling.items():
            setattr(self, name, value)
        if isinstance(self.sources, AdapterStore):
            self._sources, self.sources = self.sources, self.sources.origin
        elif isinstance(self.sources, os.PathLike):
            self.sources = os.fspath(self.sources)
        elif not isinstance(self.sources, str | None):
            raise AdapterConfigError(NO_STORE.format(self.sources))

    @property
    def named_bases(self) -> dict[str, Any]:
        """Where the subspace and the sources are, as `eigenpeft.tuners.eigenlora.bases.find_bases` takes it."""
        held = self._subspace
        return {
            "held": held if held is not None and held.fingerprint == self.subspace_sha256 else None,
            "subspace": self.subspace,
            "revision": self.subspace_revision,
            "fingerprint": self.subspace_sha256,
            "sources": self.sources if self._sources is None else self._sources,  # an open one without members is false
            "is_embedded": self.embedded_n_components is not None,
            "adapter": self.read_from,
            "is_from_file": self.is_from_file,
        }

    @property
    def start_adapters(self) -> Any:
        """What `init_adapters` was given."""
        return self._init_adapters

    def __getstate__(self) -> dict[str, Any]:
        """Without open stores and collections, which have files."""
        return self.__dict__ | {"_init_adapters": self.init_adapters, "_sources": None}

    def note_start(self) -> None:
        """Note that an adapter has started: what is saved from now on is a trained adapter's file."""
        self.has_started = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The config of a saved adapter, as PEFT reads it; a local folder is remembered, since its subspace may stand beside it.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            subfolder: Folder within it; None for its root.
            **kwargs: PEFT's.
        """
        config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if folder.is_dir():
            config.read_from = folder
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields, as the adapter's file has them: without the start of an adapter that has started."""
        values: dict[str, Any] = super().to_dict()
        if self.has_started:
            values.update(dict.fromkeys(START_FIELDS))
        return values

    @property
    def embeds_subspace(self) -> bool:
        """Whether saving the adapter saves the components too."""
        return self.save_subspace == "embed" or self.subspace is None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
