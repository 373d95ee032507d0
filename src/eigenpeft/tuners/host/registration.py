"""Make an outside method known to PEFT: the only code that touches PEFT's enum, registry and tables."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.optimizers.lorafa import LoraFAOptimizer
from peft.tuners import mixed
from peft.tuners.lora import LoraModel
from peft.utils import hotswap, save_and_load
from peft.utils.peft_types import PeftType, register_peft_method
from torch import nn

from eigenpeft.errors import EigenPeftError


def peft_type(name: str) -> PeftType:
    """The member `name` of PEFT's enum of methods, added when it is not there yet.

    `register_peft_method` refuses names outside the enum, and transformers reads `.value` of the member, so that a
    plain string will not do (PEFT issue 2273 and change 2282). Adding is idempotent.

    Args:
        name: Upper-case name.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # pyright: ignore[reportAttributeAccessIssue]
    member._sort_order_ = len(PeftType._member_names_)  # pyright: ignore[reportAttributeAccessIssue]
    # Before the maps know the name: EnumType refuses to set an attribute that is a member.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(name: str, *, config_cls: type, model_cls: type, hotswap_keys: Sequence[str]) -> None:
    """Register a method built on LoRA's layers; doing so again is harmless.

    Args:
        name: Upper-case name.
        config_cls: Its configuration.
        model_cls: Its tuner, a `LoraModel` with the prefix "lora_".
        hotswap_keys: Config fields that must agree for two adapters to be swapped in place.

    Raises:
        EigenPeftError: If another package, or PEFT itself, has registered the name.
    """
    kind = peft_type(name)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind), PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if known == (config_cls, model_cls):
        return
    if known != (None, None):
        raise EigenPeftError(
            f"PEFT already knows a method {name}: {known[0]!r}. eigenpeft does not replace it; use a version of eigenpeft "
            "and PEFT that go together, or remove the other package."
        )
    register_peft_method(
        name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix="lora_", is_mixed_compatible=True
    )
    hotswap.CONFIG_KEYS_TO_CHECK[kind] = list(hotswap_keys)


def admit_to_mixed_models(names: Sequence[str], *, tuner: type[mixed.MixedModel]) -> None:
    """Let PEFT's mixed models take registered methods; doing so again is harmless.

    A mixed model is of PEFT's own class until it gets an adapter of ours.

    Args:
        names: Upper-case names.
        tuner: PEFT's own tuner, extended: what a mixed model becomes with its first adapter of one of these methods.
    """
    kinds = tuple(peft_type(name) for name in names)
    mixed.COMPATIBLE_TUNER_TYPES = tuple(dict.fromkeys((*mixed.COMPATIBLE_TUNER_TYPES, *kinds)))
    inject = mixed.MixedModel.inject_adapter
    if hasattr(inject, "__wrapped__"):
        return

    @wraps(inject)
    def inject_adapter(self: mixed.MixedModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if type(self) is mixed.MixedModel and self.peft_config[adapter_name].peft_type in kinds:
            self.__class__ = tuner  # same fields, so that it is as if it had been made of this class
            self.inject_adapter(model, adapter_name, *args, **kwargs)
        else:
            inject(self, model, adapter_name, *args, **kwargs)

    mixed.MixedModel.inject_adapter = inject_adapter


def replace_rank_padding(pad: Callable[..., bool], *, is_ours: Callable[[nn.Module], bool]) -> None:
    """Have PEFT's `prepare_model_for_compiled_hotswap` pad ranks by `pad` where that is needed; twice is harmless.

    Args:
        pad: Takes a model and the rank.
        is_ours: Whether a model has adapters that PEFT's own function would not understand; it gets all others.
    """
    plain = hotswap._pad_lora_weights
    if hasattr(plain, "__wrapped__"):
        return

    @wraps(plain)
    def padded(model: nn.Module, target_rank: int) -> bool:
        return (pad if is_ours(model) else plain)(model, target_rank)

    hotswap._pad_lora_weights = padded


def prepare_swapped_tensors(prepare: Callable[..., dict[str, Any]]) -> None:
    """Have PEFT's hot-swapping change the new adapter's tensors by `prepare` first; doing so again is harmless.

    Args:
        prepare: Takes the model and the tensors by their names in it, and returns what is to be swapped in.
    """
    swap = hotswap.hotswap_adapter_from_state_dict
    if hasattr(swap, "__wrapped__"):
        return

    @wraps(swap)
    def prepared(model: nn.Module, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        swap(model, prepare(model, state_dict), *args, **kwargs)

    hotswap.hotswap_adapter_from_state_dict = prepared


def replace_name_filter(own_tensors: Callable[..., dict[str, Any]]) -> None:
    """Have PEFT tell the tensors of several adapters apart by `own_tensors`; doing so again is harmless.

    Args:
        own_tensors: Takes a state dict, the other adapters' names, and PEFT's own rule as `by_word`, which it leaves to models
            without our adapters.
    """
    by_word = save_and_load._filter_state_dict_for_adapter_name
    if hasattr(by_word, "__wrapped__"):
        return

    @wraps(by_word)
    def filtered(state_dict: dict[str, Any], unwanted_adapter_names: list[str]) -> dict[str, Any]:
        return own_tensors(state_dict, unwanted_adapter_names, by_word=by_word)

    save_and_load._filter_state_dict_for_adapter_name = filtered


def check_lorafa(check: Callable[[Sequence[str]], None]) -> None:
    """Have PEFT's LoRA-FA optimizer call `check` with the names of a group's parameters before it takes them.

    Args:
        check: Raises when the optimizer would pair tensors of ours that are not A and B.
    """
    init = LoraFAOptimizer.__init__
    if hasattr(init, "__wrapped__"):
        return

    @wraps(init)
    def checked(self: LoraFAOptimizer, params: Any, *args: Any, **kwargs: Any) -> None:
        # Groups with names come as a list, from `create_lorafa_optimizer`; whatever else comes goes on as it is.
        for group in params if isinstance(params, list) else ():
            if isinstance(group, dict) and isinstance(group.get("names"), list):
                check(group["names"])
        init(self, params, *args, **kwargs)

    LoraFAOptimizer.__init__ = checked


def extend_lora(injecting: Callable[..., AbstractContextManager[None]]) -> None:
    """Have PEFT's LoRA make an adapter's layers inside a context; doing so again is harmless.

    Args:
        injecting: Takes the model, the adapter's configuration and its name.
    """
    inject = LoraModel.inject_adapter
    if hasattr(inject, "__wrapped__"):
        return

    @wraps(inject)
    def inject_adapter(self: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with injecting(model, self.peft_config[adapter_name], adapter_name):
            inject(self, model, adapter_name, *args, **kwargs)

    LoraModel.inject_adapter = inject_adapter
