"""Configuration of gated composition, which is experimental."""

import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from eigenpeft.errors import AdapterConfigError
from eigenpeft.subspace import AdapterStore, PrincipalSubspace
from eigenpeft.tuners.host.adapter_card import ExplainedConfig
from eigenpeft.tuners.host.registration import peft_type
from eigenpeft.tuners.host.restrictions import check_lora_options

# What needs a matrix of the update, or is defined by LoRA's own factors.
_NEEDS_FACTORS = (
    "use_dora",
    "use_rslora",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "ensure_weight_tying",
    "loftq_config",
    "corda_config",
    "lora_ga_config",
    "rank_pattern",
    "alpha_pattern",
)
_START_FIELDS = ("sources", "source_names", "subspace")


@dataclass
class GatedLoraConfig(ExplainedConfig):
    """Experimental: compose cores anew for every token, `V_outᵀ (Σ_e g_e M_e) V_in x` with `g = softmax(W_g V_in x)`.

    The form of CoMoL (Cao et al., arXiv 2603.00573, abstract: core experts are chosen "for each token", and "merged via a
    soft-merging strategy"). The cores M_e start at the members of a store (`sources`), or at zero in a subspace (`subspace`,
    `n_cores`); the gate is trained, and the cores too unless `train_cores=False`.
    With `gate="arrow"` nothing is trained: a token's weights follow from
    the members' own leading directions (Arrow, arXiv 2405.11157, section 4). No scaling multiplies the cores: `r` and
    `lora_alpha` have no meaning.

    Such an adapter is saved (with its bases, in its own file), loaded, trained, resumed, and used in mixed batches as any other
    of PEFT. It cannot be merged, combined, converted or exported, and no store keeps it, since no matrix has its update; that is
    refused by name. Linear layers and Conv1D only. The interface may change without a deprecation.

    Raises:
        AdapterConfigError: If a field has a value that the method does not define.

    Examples:
        >>> from eigenpeft.tuners.gated import GatedLoraConfig
        >>> GatedLoraConfig(subspace="my-subspace", n_cores=4, balance=0.01).train_cores
        True
    """

    method_name = "GatedLoRA"
    is_exportable = False

    sources: Any = field(
        default=None,
        metadata={"help": "Store whose members' cores are composed: an AdapterStore, its folder or its Hub id."},
    )
    source_names: list[str] | None = field(
        default=None, metadata={"help": "Members of `sources` that are composed, in order; None takes all."}
    )
    subspace: Any = field(
        default=None,
        metadata={
            "help": "PrincipalSubspace, its folder or its Hub id, for cores that start at zero, without `sources`."
        },
    )
    n_cores: int = field(
        default=4,
        metadata={
            "help": "Cores per module; with `sources` set by itself to the number of members. 4 is chosen here; it is not tuned."
        },
    )
    train_cores: bool = field(
        default=True, metadata={"help": "Train the cores too; False trains the gate alone, and needs `sources`."}
    )
    gate: Literal["trained", "arrow"] = field(
        default="trained",
        metadata={
            "help": "What weighs the cores of a token z = V_in x. 'trained': g = softmax(W_g z) (CoMoL). 'arrow': softmax over the "
            "`top_k` largest |p_e · z|, p_e the leading right singular vector of M_e; nothing is trained."
        },
    )
    top_k: int = field(
        default=3,
        metadata={
            "help": "Cores that act on a token with gate='arrow' (arXiv 2405.11157); 3 as in PEFT's ArrowConfig."
        },
    )
    balance: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the load-balance loss E Σ_e ḡ_e² of each layer and forward pass; 0, chosen here, is without. Its "
            "gradient is added in the "
            "backward pass, by whatever trainer: the loss that a trainer shows is without it, gradient accumulation counts it "
            "once per forward pass, and float16 loss scaling does not scale it."
        },
    )
    core_sizes: dict[str, Any] | None = field(
        default=None, metadata={"help": "[E, K_out, K_in] of each module; set by itself."}
    )

    def __post_init__(self):
        super().__post_init__()
        from_file = self.is_from_file
        self.peft_type = peft_type("GATEDLORA")
        check_lora_options(self, method="GatedLoRA", unsupported=_NEEDS_FACTORS)
        self.lora_alpha = self.r  # a scaling of 1
        if type(self.n_cores) is not int or self.n_cores < 1:
            raise AdapterConfigError(f"n_cores={self.n_cores!r} must be a whole number of at least 1.")
        number = isinstance(self.balance, int | float) and not isinstance(self.balance, bool)
        if not number or not math.isfinite(self.balance) or self.balance < 0:
            raise AdapterConfigError(f"balance={self.balance!r} must be a finite number of at least 0.")
        self._check_gate()
        if not isinstance(self.core_sizes, dict | None):
            raise AdapterConfigError(f"core_sizes={str(self.core_sizes)[:80]!r} must be None or sizes by module name.")
        if from_file:  # a file's numbers take the place of these, and they could name anything of the reader's
            self.sources = self.source_names = self.subspace = None
        elif (self.sources is None) == (self.subspace is None) or not (self.train_cores or self.sources):
            raise AdapterConfigError(
                f"sources={_shown(self.sources)} and subspace={_shown(self.subspace)} with train_cores={self.train_cores}: pass a "
                "store as sources=, whose members' cores are composed, or a subspace as subspace= with cores that are trained from "
                "zero."
            )
        # Kept beside the fields, which must stay plain values.
        self._given: AdapterStore | PrincipalSubspace | None = None
        for name, kind in (("sources", AdapterStore), ("subspace", PrincipalSubspace)):
            given = getattr(self, name)
            if isinstance(given, os.PathLike):
                setattr(self, name, os.fspath(given))
            elif isinstance(given, kind):
                self._given = given
                setattr(self, name, given.origin or "(in memory)")

    def _check_gate(self) -> None:
        if self.gate not in ("trained", "arrow"):
            raise AdapterConfigError(f"gate={self.gate!r} must be 'trained' or 'arrow'.")
        if type(self.top_k) is not int or self.top_k < 1:
            raise AdapterConfigError(f"top_k={self.top_k!r} must be a whole number of at least 1.")
        if self.gate == "arrow" and (self.train_cores or self.balance):
            raise AdapterConfigError(
                f"gate='arrow' with train_cores={self.train_cores} and balance={self.balance}: the weights follow from the cores, "
                "and nothing is trained. Pass train_cores=False and leave balance out."
            )

    @property
    def given(self) -> AdapterStore | PrincipalSubspace | None:
        """The store or the subspace that was passed open; None where a path was passed, or none."""
        return self._given

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open."""
        return self.__dict__ | {"_given": None}

    def to_dict(self) -> dict[str, Any]:
        """The fields, as the adapter's file has them: without the start of an adapter that has started."""
        values: dict[str, Any] = super().to_dict()
        if self.core_sizes is not None:
            values.update(dict.fromkeys(_START_FIELDS))
        return values


def _shown(given: Any) -> str:
    return repr(given) if isinstance(given, str | None) else f"a {type(given).__name__}"
