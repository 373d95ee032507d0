"""What an adapter's config and README say: what its update depends on, and which configs are not plain LoRA."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eigenpeft.artifacts.reading import read_json, read_start
from eigenpeft.collection.formats.other_tools import format_of_config
from eigenpeft.collection.formats.patterns import PatternTable

CONFIG_NAME = "adapter_config.json"
OWN_METHODS = ("EIGENLORA", "MOSLORA", "SHARDLORA")
"""Values of `peft_type` in the files of our methods whose adapters `export_lora` writes as plain LoRA."""

# Fields of PEFT's LoraConfig whose update is not s B A on the original weight. `velora_config` changes only what is
# stored for the backward pass, `init_lora_weights="mica"` only what is trained: both stay plain LoRA.
REFUSED_FIELDS = {
    "use_dora": "DoRA also rescales the merged weight, so its update is not s B A",
    "use_qalora": "QA-LoRA pools the inputs, so its lora_A does not act on the module's inputs",
    "alora_invocation_tokens": "activated LoRA acts only after its invocation tokens",
    "monteclora_config": "Monteclora adds sampled perturbations to the factors",
    "kasa_config": "KaSA truncates the base weight and puts a diagonal between the factors",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "arrow_config": "Arrow routes between other adapters and has no update of its own",
    "layer_replication": "its model repeats layers, so its module names are not those of the base model",
    "target_parameters": "it adapts stacked parameters (experts), each with many updates instead of one",
}
PLAIN_INITIALIZATIONS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
# Initialisations that move part of the base weight into the factors and leave an altered base behind.
ALTERING_INITIALIZATIONS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_KNOWN_USES = frozenset({"use_rslora", *(name for name in REFUSED_FIELDS if name.startswith("use_"))})


# What LoraConfig of PEFT 0.21 has, and fields of earlier versions that changed nothing about an update.
KNOWN_FIELDS = frozenset(
    {
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "enable_lora",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "kasa_config",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "merge_weights",
        "modules_to_save",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
    }
)


@dataclass(frozen=True)
class LoraSettings:
    """The part of an adapter's config that its update depends on.

    Attributes:
        rank: Default rank r.
        lora_alpha: Default alpha.
        use_rslora: Whether the scaling is alpha / sqrt(r) (arXiv 2312.03732) instead of alpha / r.
        rank_pattern: Ranks of modules that differ from the default, by pattern.
        alpha_pattern: Alphas of modules that differ from the default, by pattern.
        fan_in_fan_out: Whether the base weights are stored transposed (GPT-2's Conv1D).
        base_model: Name or path of the base model, if the config says.
        task_type: PEFT's task type, if the config says.
        base_model_revision: Revision of the base model, if the config says.
        unknown_fields: Fields with a value that PEFT 0.21 does not have: of a newer version, or of another tool.
    """

    rank: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[float]
    fan_in_fan_out: bool
    base_model: str | None
    task_type: str | None
    base_model_revision: str | None = None
    unknown_fields: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """Rank the config gives a module.

        Args:
            module: Name in the adapter's own model.

        Raises:
            ValueError: If the config's patterns take too long to be matched; the message is a clause to put behind "has".
        """
        return self.rank_pattern.value(module, default=self.rank)

    def scaling_of(self, module: str) -> float:
        """Scaling s of a module's update s B A: alpha / r, or alpha / sqrt(r) with rsLoRA.

        Args:
            module: Name in the adapter's own model.

        Raises:
            ValueError: As `rank_of`.
        """
        rank = self.rank_of(module)
        return self.alpha_pattern.value(module, default=self.lora_alpha) / (
            math.sqrt(rank) if self.use_rslora else rank
        )


def read_settings(folder: Path) -> tuple[LoraSettings | None, list[str]]:
    """Read and check the config of one adapter.

    Args:
        folder: Folder of the adapter.

    Returns:
        The settings, None when there are problems; and the problems, each a clause to put behind the adapter's name.
    """
    try:
        config = read_json(folder / CONFIG_NAME)
    except FileNotFoundError:
        return None, [f"has no {CONFIG_NAME}; save it with PEFT's save_pretrained, or leave it out"]
    except OSError as error:
        return None, [f"its {CONFIG_NAME} cannot be read: {error.strerror or error}"]
    except ValueError as error:
        return None, [f"its {CONFIG_NAME} is not valid JSON ({error}); download it again, or leave the adapter out"]
    if not isinstance(config, dict):
        return None, [f"its {CONFIG_NAME} holds {type(config).__name__} instead of a JSON object"]
    problems = _problems_of_method(config)
    if problems:
        return None, problems
    return settings_of(config)


def settings_of(config: Mapping[str, Any]) -> tuple[LoraSettings | None, list[str]]:
    """What an update depends on, of a config that has LoRA's fields, whatever the method.

    Args:
        config: As adapter_config.json says it.

    Returns:
        As `read_settings`.
    """
    problems = _problems_of_values(config)
    return (None, problems) if problems else (_settings(config), [])


def license_of(folder: Path) -> str | None:
    """License from the front matter of the adapter's README.md, if it says.

    Args:
        folder: Folder of the adapter.
    """
    try:
        lines = read_start(folder / "README.md", limit=100_000).decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            break
        key, _, value = line.partition(":")
        if key == "license":
            return value.strip().strip("\"'") or None
    return None


def _problems_of_method(config: dict[str, Any]) -> list[str]:
    kind = str(config.get("peft_type")).upper()
    if kind in OWN_METHODS:
        return [f"is of peft_type {kind!r}; write it as a plain LoRA adapter first, with eigenpeft.export_lora"]
    if (found := format_of_config(config)) is not None:
        return [found]
    if kind != "LORA":
        return [f"is of peft_type {config.get('peft_type')!r}; only 'LORA' has an update s B A to take apart"]
    problems = [
        f"has {name}={_short(config[name])}: {why}; leave it out"
        for name, why in REFUSED_FIELDS.items()
        if config.get(name)
    ]
    problems += [
        f"has {name}=True, which is not a variant of LoRA known here; leave it out"
        for name, value in config.items()
        if name.startswith("use_") and name not in _KNOWN_USES and value
    ]
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(ALTERING_INITIALIZATIONS):
        problems.append(
            f"has init_lora_weights={_short(config['init_lora_weights'])}, which alters the base weights, so that s B A "
            "is not an update of the original model; "
            + (
                "train it again with another initialisation, or leave it out"
                if start == "loftq"
                else "convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        )
    elif start not in PLAIN_INITIALIZATIONS:
        problems.append(
            f"has init_lora_weights={_short(config['init_lora_weights'])}, which is not known to leave the base weights "
            f"alone; known are {', '.join(sorted(PLAIN_INITIALIZATIONS))}"
        )
    return problems


def _problems_of_values(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if not _is_rank(config.get("r")):
        problems.append(f"has r={_short(config.get('r'))} in its config; it must be a whole number of at least 1")
    if not _is_number(config.get("lora_alpha")):
        problems.append(f"has lora_alpha={_short(config.get('lora_alpha'))} in its config; it must be a finite number")
    for name, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            problems.append(f"has {name}={_short(patterns)} in its config; it must map patterns to numbers")
            continue
        unusable = [(pattern, value) for pattern, value in patterns.items() if not fits(value)]
        problems += [
            f"has {name}[{_short(pattern)}]={_short(value)} in its config, which is not a usable number"
            for pattern, value in unusable[:3]
        ]
        try:
            PatternTable(patterns)
        except ValueError as error:
            problems.append(f"has {name} with {error}")
    return problems


def _settings(config: Mapping[str, Any]) -> LoraSettings:
    return LoraSettings(
        rank=config["r"],
        lora_alpha=float(config["lora_alpha"]),
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=PatternTable(config.get("rank_pattern") or {}),
        alpha_pattern=PatternTable(config.get("alpha_pattern") or {}),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        base_model=_text(config.get("base_model_name_or_path")),
        task_type=_text(config.get("task_type")),
        base_model_revision=_text(config.get("revision")),
        unknown_fields=tuple(sorted(name for name, value in config.items() if value and name not in KNOWN_FIELDS)),
    )


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
