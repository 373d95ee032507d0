"""Configuration of EigenLoRA."""

import logging
import re
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

from eigenpeft.errors import AdapterConfigError
from eigenpeft.subspace import PrincipalSubspace
from eigenpeft.subspace.cores import FROM_ZERO, RENAMED, core_kind
from eigenpeft.tuners.host.adapter_card import ExplainedConfig
from eigenpeft.tuners.host.registration import peft_type
from eigenpeft.tuners.host.restrictions import check_lora_options
from eigenpeft.tuners.layers.shared_bases import remember
from eigenpeft.version import __version__

logger = logging.getLogger(__name__)
# Starts that write A and B from the base model's weights, which lie in no subspace; and layers that the subspace has not.
_BEYOND_THE_SUBSPACE = ("layer_replication", "loftq_config", "corda_config", "lora_ga_config")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class EigenLoraConfig(ExplainedConfig):
    """Train coefficients on the frozen components of a principal subspace: `ΔW = s·V_outᵀ M V_in` (arXiv 2502.04700).

    All of `peft.LoraConfig`'s fields apply; `target_modules` defaults to the subspace's modules, and `r` also sets the
    scaling `s = lora_alpha / r` (or `/ sqrt(r)` with `use_rslora`) of the cores that have no rank of their own.

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
        metadata={
            "help": "Path or Hub id of the subspace (or of a coefficient store), or the PrincipalSubspace itself."
        },
    )
    subspace_revision: str | None = field(default=None, metadata={"help": "Hub revision of the subspace."})
    subspace_sha256: str | None = field(
        default=None,
        metadata={"help": "Fingerprint that the subspace must have; set by itself when the adapter is made."},
    )
    n_components: int | None = field(
        default=None, metadata={"help": "Use only the first n_components of each module; None uses all."}
    )
    core: Literal["low_rank", "full", "diagonal"] = field(
        default="low_rank",
        metadata={
            "help": "Form of M (K, K). 'low_rank': C_out C_in with 2 K r parameters per module (EigenLoRAx); 'full': all "
            "K² entries (LoRA-XS); 'diagonal': K entries (Compress then Serve). All start at ΔW = 0. 'mixer', the old name "
            "of 'full', is deprecated."
        },
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Warm start: folder or Hub id of a LoRA adapter, which is projected onto the subspace, or "
            "'<folder or Hub id of a store>#<member>'. The adapter's own file does not name it: reloading needs no source."
        },
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
    requires_package: str = field(
        default="eigenpeft",
        metadata={"help": "Written to adapter_config.json to tell readers what to install: pip install eigenpeft."},
    )
    eigenpeft_version: str = field(default=__version__, metadata={"help": "Version that wrote the adapter."})

    def __post_init__(self):
        self.is_from_file = from_file = (
            self.peft_type is not None
        )  # which users leave out, and PEFT's files always have
        super().__post_init__()
        self.peft_type = peft_type("EIGENLORA")
        self._has_started = False
        check_lora_options(self, method="EigenLoRA", unsupported=_BEYOND_THE_SUBSPACE)
        if isinstance(self.core, str) and self.core in RENAMED:
            self.core = core_kind(self.core, from_file=from_file, stacklevel=4).name  # pyright: ignore[reportAttributeAccessIssue]
        for name, allowed in (("core", FROM_ZERO), ("save_subspace", ("reference", "embed"))):
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
        if isinstance(self.subspace, PrincipalSubspace):
            # Kept beside the fields: they must stay plain values that JSON and `asdict` can take.
            self._subspace, fingerprint = self.subspace, remember(self.subspace)
            if self.subspace_sha256 not in (None, fingerprint):
                raise AdapterConfigError(
                    f"subspace_sha256={self.subspace_sha256!r} is not the fingerprint {fingerprint!r} of the subspace "
                    "passed; leave it out or pass the subspace that has it."
                )
            self.subspace_sha256, self.subspace_revision = fingerprint, self.subspace.revision
            self.subspace = self.subspace.origin

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
        if self.is_from_file and self.init_from is not None:
            # A start is for making adapters: a file's numbers take its place, and it could name anything of the reader's.
            logger.warning(
                "init_from=%r in an adapter's file is passed over: the adapter has its numbers.", self.init_from
            )
            self.init_from = None
        if not isinstance(self.subspace, str | PathLike | PrincipalSubspace | None):
            raise AdapterConfigError(
                f"subspace={str(self.subspace)[:80]!r} must be a path, a Hub id or a PrincipalSubspace."
            )
        if self.subspace_sha256 is not None and not _SHA256.fullmatch(str(self.subspace_sha256)):
            raise AdapterConfigError(
                f"subspace_sha256={str(self.subspace_sha256)[:80]!r} must be 64 hexadecimal digits, or None."
            )
        if not isinstance(self.embedded_n_components, dict | None):
            raise AdapterConfigError(
                f"embedded_n_components={str(self.embedded_n_components)[:80]!r} must be None or a number of components by "
                "module name; the config was altered, get a fresh copy of the adapter."
            )

    def note_start(self) -> None:
        """Note that an adapter has started from `init_from`: what is saved from now on is a trained adapter's file."""
        self._has_started = True

    def to_dict(self) -> dict[str, Any]:
        """The fields, as the adapter's file has them: without the start of an adapter that has started."""
        values = super().to_dict()
        return values | {"init_from": None} if self._has_started else values

    @property
    def embeds_subspace(self) -> bool:
        """Whether saving the adapter saves the components too."""
        return self.save_subspace == "embed" or self.subspace is None
