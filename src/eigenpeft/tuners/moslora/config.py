"""Configuration of MoSLoRA."""

from dataclasses import dataclass, field
from typing import Literal

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.host.adapter_card import ExplainedConfig
from eigenpeft.tuners.host.registration import peft_type
from eigenpeft.tuners.host.restrictions import check_lora_options

MIXER_STARTS = ("kaiming", "orthogonal", "identity")
WRITTEN_STARTS = ("orthogonal", "pissa", "olora", "corda", "lora_ga", "loftq", "mica")
"""Values of `init_lora_weights`, by what they begin with, that write A and B themselves: `B M A` starts as their `B A`."""


@dataclass
class MosLoraConfig(ExplainedConfig):
    """Mixture-of-subspaces LoRA: `ΔW = s·B·M·A` with a trained r x r mixer M (arXiv 2406.11909, equation 3).

    All of `peft.LoraConfig`'s fields apply. It folds exactly into a plain LoRA (`B' = B M`) when merged or exported, so
    what it changes is the course of training, not what can be expressed; compare with plain LoRA before choosing it.

    Starts that write A and B themselves (`init_lora_weights` "pissa", "olora", "corda", "mica", ...) are exact: B starts as
    `B M⁻¹`, so that `B M A` is their `B A`. The mixer starts orthogonal there when `init_mixer` says "kaiming", since the
    inverse of a Kaiming mixer would make B many times larger. With block-diagonal factors (`use_bdlora`) every block has a
    mixer of its own, so that no two blocks are joined.

    Raises:
        AdapterConfigError: If a field has a value that the method does not define.

    Examples:
        >>> from eigenpeft import MosLoraConfig
        >>> MosLoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]).init_mixer
        'kaiming'
    """

    method_name = "MoSLoRA"

    init_mixer: Literal["kaiming", "orthogonal", "identity"] = field(
        default="kaiming",
        metadata={
            "help": "Start of the mixer: 'kaiming' (uniform, a = sqrt 5), the paper's best with 'orthogonal'; 'identity' "
            "is plain LoRA at the start. A zero mixer never learns and is not offered. 'kaiming' means 'orthogonal' with an "
            "init_lora_weights that writes A and B (PiSSA and others), since the mixer is inverted there."
        },
    )
    train_mixer: bool = field(
        default=True,
        metadata={
            "help": "Train the mixer. False keeps it as it starts, a control: with an orthogonal one this trains as LoRA does."
        },
    )
    fold: bool = field(
        default=False,
        metadata={
            "help": "Start a plain LoRA from the folded start of MoSLoRA (A' = M A, no mixer afterwards): the control that "
            "tells what the mixer's training adds to its start. Linear layers, Conv1D, embeddings, convolutions without groups."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type("MOSLORA")
        if self.init_mixer not in MIXER_STARTS:
            raise AdapterConfigError(
                f"init_mixer={self.init_mixer!r} must be one of {', '.join(map(repr, MIXER_STARTS))}."
            )
        check_lora_options(self, method="MoSLoRA", starts=WRITTEN_STARTS)
        if self.use_bdlora and self.writes_factors:
            raise AdapterConfigError(
                f"init_lora_weights={self.init_lora_weights!r} and use_bdlora exclude each other: PEFT puts blocks in the place "
                "of one of the factors that the start has written. Leave one of the two out."
            )
        if self.fold and (self.kasa_config or self.use_bdlora):
            raise AdapterConfigError(
                "fold=True makes a plain LoRA of the start, which is not defined with kasa_config or use_bdlora; leave it out."
            )

    @property
    def mixer_start(self) -> str:
        """How the mixer starts: `init_mixer`, but orthogonal in the place of Kaiming where B starts as `B M⁻¹`."""
        return "orthogonal" if self.writes_factors and self.init_mixer == "kaiming" else self.init_mixer

    @property
    def writes_factors(self) -> bool:
        """Whether the start writes both A and B, rather than leaving one of them zero and the other random."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.lower().startswith(WRITTEN_STARTS)
