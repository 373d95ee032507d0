"""PEFT's mixed models (`get_peft_model(..., mixed=True)`) with adapters of our methods beside those of other ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.mixed import MixedModel
from torch import nn

from eigenpeft.tuners.host.exact_merging import make_exact
from eigenpeft.tuners.host.factor_model import FactorModel, give_factors, has_adapter, write_names
from eigenpeft.tuners.host.restrictions import check_sizes


class FactorMixedModel(MixedModel):
    """PEFT's own mixed tuner, which makes plain LoRA of every configuration that is LoRA's child; ours get factors."""

    # What a method's `injecting` yielded, while an adapter is injected.
    _given: Any = None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's.

        Args:
            model: Model to adapt.
            adapter_name: Name of the new adapter.
            *args: PEFT's own.
            **kwargs: PEFT's own.

        Raises:
            AdapterConfigError: If a file's ranks or scalings do not fit the model.
        """
        with _injecting(model, self.peft_config[adapter_name], adapter_name) as self._given:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._given = None

    def _create_and_replace(self, config, adapter_name: str, target, target_name: str, parent, current_key, **kwargs):
        had = has_adapter(target, adapter_name)
        super()._create_and_replace(config, adapter_name, target, target_name, parent, current_key, **kwargs)
        method = _method(config)
        if method is not None:
            extended = not had and has_adapter(target, adapter_name)
            tuned: Any = target if extended else getattr(parent, target_name)
            give_factors(
                self,
                method=method,
                tuned=tuned,
                config=config,
                adapter_name=adapter_name,
                target_name=target_name,
                key=current_key,
                given=self._given,
            )

    @staticmethod
    def _create_new_module(config, adapter_name, target, **kwargs):
        layer: Any = MixedModel._create_new_module(config, adapter_name, target, **kwargs)
        return make_exact(layer) if _method(config) is not None else layer

    def _get_name(self) -> str:
        # PEFT's own name, in representations.
        return MixedModel.__name__


def _method(config: PeftConfig) -> type[FactorModel] | None:
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)  # pyright: ignore[reportArgumentType]
    return tuner if tuner is not None and issubclass(tuner, FactorModel) else None


@contextmanager
def _injecting(model: nn.Module, config: Any, adapter_name: str) -> Iterator[Any]:
    method = _method(config)
    if method is None:
        yield None
    else:
        if getattr(config, "is_from_file", False):
            check_sizes(model, r=config.r, rank_pattern=config.rank_pattern, alpha_pattern=config.alpha_pattern)
            write_names(config, model)
        with method.injecting(model, config=config, adapter_name=adapter_name) as given:
            yield given
