"""Which of LoRA's own options our methods take, checked when a config is made."""

from peft import LoraConfig

from eigenpeft.errors import AdapterConfigError

_STARTS = (True, False, "gaussian")
_UNSUPPORTED = (
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "megatron_config",
    "kasa_config",
    "loftq_config",
    "corda_config",
    "eva_config",
    "lora_ga_config",
)


def check_lora_options(config: LoraConfig, *, method: str, unsupported: tuple[str, ...] = ()) -> None:
    """Refuse the LoRA variants and starts that the method does not define.

    Args:
        config: Configuration with LoRA's fields.
        method: What messages call it.
        unsupported: Further fields that must be unset.

    Raises:
        AdapterConfigError: One message with every field that cannot stay.
    """
    problems = [
        f"{name}={getattr(config, name)!r} is not supported; leave it out"
        for name in (*_UNSUPPORTED, *unsupported)
        if getattr(config, name, None)
    ]
    if config.init_lora_weights not in _STARTS:
        problems.append(
            f"init_lora_weights={config.init_lora_weights!r} must be one of {', '.join(map(repr, _STARTS))}: starts "
            "that change or depend on the base weights are not defined here"
        )
    if not isinstance(config.r, int) or config.r < 1:
        problems.append(f"r={config.r!r} must be a whole number of at least 1")
    if problems:
        raise AdapterConfigError(f"{method} cannot be set up as asked: {'; '.join(problems)}.")
