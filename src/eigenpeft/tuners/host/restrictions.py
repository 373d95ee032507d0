"""Which of LoRA's own options our methods take, checked when a config is made."""

from collections.abc import Sequence

from peft import LoraConfig

from eigenpeft.errors import AdapterConfigError

_PLAIN_STARTS = (True, False, "gaussian")
# Layers that take the inputs otherwise, or no factors of their own. EVA is loaded after the model is made, by code of PEFT's
# that makes every layer whose rank changes anew, as plain LoRA.
_UNSUPPORTED = ("use_qalora", "arrow_config", "megatron_config", "eva_config")


def check_lora_options(
    config: LoraConfig, *, method: str, starts: Sequence[str] = (), unsupported: Sequence[str] = ()
) -> None:
    """Refuse the LoRA variants and starts that the method does not define.

    Args:
        config: Configuration with LoRA's fields.
        method: What messages call it.
        starts: Further values of `init_lora_weights` that the method takes, by what they begin with.
        unsupported: Further fields that must be unset.

    Raises:
        AdapterConfigError: One message with every field that cannot stay.
    """
    problems = [
        f"{name}={getattr(config, name)!r} is not supported; leave it out"
        for name in (*_UNSUPPORTED, *unsupported)
        if getattr(config, name, None)
    ]
    if config.init_lora_weights not in _PLAIN_STARTS and not str(config.init_lora_weights).lower().startswith(
        tuple(starts)
    ):
        problems.append(
            f"init_lora_weights={config.init_lora_weights!r} must be one of "
            f"{', '.join(map(repr, (*_PLAIN_STARTS, *starts)))}: other starts write A and B in a way that is not defined here"
        )
    if not isinstance(config.r, int) or config.r < 1:
        problems.append(f"r={config.r!r} must be a whole number of at least 1")
    if problems:
        raise AdapterConfigError(f"{method} cannot be set up as asked: {'; '.join(problems)}.")
